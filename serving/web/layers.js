// Masks over the image: every outline on one canvas that changes with answers and zoom alone, the active mask on another one.

import { $ } from "./dom.js";
import { strokeOutline } from "./masks.js";
import { answerOf, byId, colourOf, state } from "./state.js";
import { view } from "./view.js";

const MAX_DENSITY = 2; // pixels of a canvas per pixel of the screen

/** A canvas as large as the viewport, empty, whose unit is a pixel of the image. */
function paintOn(canvas, isUsed) {
  const density = Math.min(devicePixelRatio, MAX_DENSITY);
  const [width, height] = isUsed ? [view.width * density, view.height * density].map(Math.round) : [1, 1];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const paint = canvas.getContext("2d");
  paint.setTransform(1, 0, 0, 1, 0, 0);
  paint.clearRect(0, 0, width, height);
  const scale = view.scale * density;
  paint.setTransform(scale, 0, 0, scale, view.left * density, view.top * density);
  return paint;
}

function isSeen([x0, y0, x1, y1]) {
  const { scale, left, top, width, height } = view;
  return left + x1 * scale >= 0 && top + y1 * scale >= 0 && left + x0 * scale <= width && top + y0 * scale <= height;
}

let drawn = ""; // what is on the canvas of all outlines

export function drawMasks() {
  const seen = state.regions.filter((region) => {
    const outline = answerOf(region)?.outline;
    return outline && isSeen(outline.bounds);
  });
  const { scale, left, top, width, height } = view;
  const answers = seen.map((region) => [region.id, answerOf(region).serial]);
  const now = JSON.stringify([answers, scale, left, top, width, height, devicePixelRatio]);
  if (now === drawn) return;
  drawn = now;
  const paint = paintOn($("masks"), seen.length > 0);
  for (const region of seen) strokeOutline(paint, answerOf(region).outline, colourOf(region), 1 / scale);
}

let drawnActive = "";

/** The hovered or selected region's mask: the only one that is filled, and so faintly that colours stay what they are. */
export function drawActiveMask() {
  const region = byId(state.hovered ?? state.selected);
  const answer = region && answerOf(region);
  const outline = answer?.outline;
  const now = JSON.stringify([outline ? answer.serial : null, state.hovered, view, devicePixelRatio]);
  if (now === drawnActive) return;
  drawnActive = now;
  const paint = paintOn($("active-mask"), Boolean(outline));
  $("masks").classList.toggle("is-faint", state.hovered !== null);
  if (!outline) return;
  paint.globalAlpha = 0.15;
  paint.fillStyle = colourOf(region);
  paint.fill(outline.path, "evenodd");
  paint.globalAlpha = 1;
  strokeOutline(paint, outline, colourOf(region), 1.2 / view.scale);
}
