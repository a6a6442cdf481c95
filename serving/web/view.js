// Which part of the image is seen, and how large: fitted to the space there is, or zoomed and panned.

import { $, setText } from "./dom.js";
import { clamp } from "./geometry.js";
import { changed, state } from "./state.js";

const AIR = 12; // screen pixels around the image, so that handles at its edges are whole
const MOST = 8; // screen pixels of one of the image's
const STEP = 1.5;

/** Of the image on the screen: pixels of it per pixel of the image, and its top left corner within the viewport. */
export const view = { scale: 1, left: 0, top: 0, width: 0, height: 0 };

let zoom = 1; // 1 is fitted
let centre = [0, 0]; // pixel of the image in the middle of the viewport

export const isZoomed = () => zoom > 1;

/** A point of a pointer event in pixels of the image, which it may lie outside of. */
export function pixelAt({ clientX, clientY }) {
  const bounds = $("viewport").getBoundingClientRect();
  return [(clientX - bounds.left - view.left) / view.scale, (clientY - bounds.top - view.top) / view.scale];
}

/** Puts the image in place again, after a change of the space for it, of the zoom or of the image. */
export function layOut() {
  if (!state.image) return;
  const { width, height } = state.image;
  Object.assign(view, { width: $("viewport").clientWidth, height: $("viewport").clientHeight });
  const natural = 3 * Math.max(width, 240) / width;
  const fitted = Math.max(Math.min((view.width - 2 * AIR) / width, (view.height - 2 * AIR) / height, natural), 1e-3);
  zoom = clamp(zoom, 1, Math.max(MOST / fitted, 1));
  view.scale = fitted * zoom;
  [view.left, centre[0]] = placed(centre[0], width * view.scale, view.width);
  [view.top, centre[1]] = placed(centre[1], height * view.scale, view.height);
  const { style, classList } = $("stage");
  Object.assign(style, {
    width: `${width * view.scale}px`,
    height: `${height * view.scale}px`,
    transform: `translate(${view.left}px, ${view.top}px)`,
  });
  classList.toggle("is-magnified", view.scale >= 4);
  setText($("zoom-fit"), isZoomed() ? `${Math.round(zoom * 100)}%` : "Fit");
  $("zoom-out").disabled = !isZoomed();
  $("zoom-in").disabled = zoom >= MOST / fitted;
  changed("view");
}

/** Along one axis: where the image begins, and which of its pixels is then in the middle. Its edges stay near the viewport's. */
function placed(middle, side, space) {
  const start = side <= space - 2 * AIR ? (space - side) / 2 : clamp(space / 2 - middle * view.scale, space - AIR - side, AIR);
  return [start, (space / 2 - start) / view.scale];
}

/** Zooms so that what is under a pointer stays there; without one, under the middle. */
export function zoomBy(factor, event) {
  const bounds = $("viewport").getBoundingClientRect();
  const at = event ? pixelAt(event) : centre;
  zoom = clamp(zoom * factor, 1, Infinity);
  layOut();
  if (!event) return;
  centre = [
    at[0] + (bounds.left + view.width / 2 - event.clientX) / view.scale,
    at[1] + (bounds.top + view.height / 2 - event.clientY) / view.scale,
  ];
  layOut();
}

export const zoomIn = () => zoomBy(STEP);
export const zoomOut = () => zoomBy(1 / STEP);

export function fit() {
  zoom = 1;
  layOut();
}

/** Moves the image by pixels of the screen. */
export function panBy(dx, dy) {
  centre = [centre[0] - dx / view.scale, centre[1] - dy / view.scale];
  layOut();
}

/** Brings a box into view, if it is not. */
export function reveal([x0, y0, x1, y1]) {
  if (!isZoomed()) return;
  const [left, top] = [view.left + x0 * view.scale, view.top + y0 * view.scale];
  const [right, bottom] = [view.left + x1 * view.scale, view.top + y1 * view.scale];
  if (left >= 0 && top >= 0 && right <= view.width && bottom <= view.height) return;
  centre = [(x0 + x1) / 2, (y0 + y1) / 2];
  layOut();
}

export function listenForZoom() {
  new ResizeObserver(layOut).observe($("viewport"));
  $("zoom-in").addEventListener("click", zoomIn);
  $("zoom-out").addEventListener("click", zoomOut);
  $("zoom-fit").addEventListener("click", fit);
  $("viewport").addEventListener("wheel", (event) => {
    const zooms = event.ctrlKey || event.metaKey;
    if (!zooms && !isZoomed()) return; // the page scrolls
    event.preventDefault();
    if (zooms) zoomBy(Math.exp(-clamp(event.deltaY, -100, 100) / 250), event);
    else panBy(-event.deltaX, -event.deltaY);
  }, { passive: false });
}
