// Mouse, pen and finger on the image.

import { $ } from "./dom.js";
import { clickKind, mode } from "./draw.js";
import { area, boxOf, clamp, contains, cornersOf } from "./geometry.js";
import { addClick, addRegion, forget, hover, moveTo, remember, select, withClick } from "./regions.js";
import { shapeOf } from "./shapes.js";
import { byId, changed, state } from "./state.js";
import { panBy, pixelAt, view, zoomBy } from "./view.js";

const MIN_DRAG = 4; // screen pixels; less is a click

const touches = new Map(); // id of a pointer -> its last event
let isPanKey = false;

/** Of a pointer event, in pixels of the image and within it. */
function position(event) {
  const [x, y] = pixelAt(event);
  return [clamp(x, 0, state.image.width), clamp(y, 0, state.image.height)];
}

const distance = ([ax, ay], [bx, by]) => Math.hypot(ax - bx, ay - by) * view.scale;
const reach = (event) => (event.pointerType === "mouse" ? 9 : 20); // screen pixels around a handle or a click

/** What can be gripped at a place: a corner of the selected box, or a click of the selected region. */
function gripAt(at, event) {
  const region = byId(state.selected);
  if (!region) return null;
  const isNear = (other) => distance(at, other) <= reach(event);
  if (region.kind === "point") {
    const click = region.at.findIndex(isNear);
    return click < 0 ? null : { action: "move", region, click };
  }
  const corners = cornersOf(region.at);
  const corner = corners.findIndex(isNear);
  return corner < 0 ? null : { action: "resize", region, from: corners[3 - corner] };
}

/** The region at a place: one with a click nearby, or else the smallest box around it. */
function regionAt(at, event) {
  const near = state.regions.filter(({ kind, at: clicks }) => kind === "point" && clicks.some((click) => distance(at, click) <= reach(event)));
  if (near.length) return near[near.length - 1];
  const around = state.regions.filter((region) => region.kind === "box" && contains(region.at, at));
  return around.sort((a, b) => area(a.at) - area(b.at))[0] ?? null;
}

function pointerDown(event) {
  if (event.isPrimary) touches.clear();
  if (event.pointerType === "touch") touches.set(event.pointerId, event);
  if (touches.size === 2) {
    cancelDrag();
    return;
  }
  const pans = event.button === 1 || (event.button === 0 && isPanKey);
  if (!pans && (event.button !== 0 || !event.isPrimary)) return;
  event.preventDefault(); // the focus goes where we say
  if (document.activeElement?.matches("textarea, select")) document.activeElement.blur();
  const at = position(event);
  const grip = pans ? { action: "pan" } : gripAt(at, event);
  state.drag = { action: "draw", from: at, mode: mode(), ...grip, down: [event.clientX, event.clientY], to: at, moved: false };
  if (grip?.action === "move") select(grip.region.id, grip.click);
  $("viewport").setPointerCapture(event.pointerId);
}

function pointerMove(event) {
  if (touches.size > 1) {
    pinch(event);
    return;
  }
  const { drag } = state;
  const at = position(event);
  if (!drag) {
    $("viewport").classList.toggle("is-over-handle", gripAt(at, event) !== null);
    if (event.pointerType === "mouse") hover(regionAt(at, event)?.id ?? null);
    return;
  }
  const [dx, dy] = [event.clientX - drag.down[0], event.clientY - drag.down[1]];
  if (drag.action === "pan") {
    panBy(dx, dy);
    drag.down = [event.clientX, event.clientY];
    return;
  }
  drag.to = at;
  if (!drag.moved && Math.hypot(dx, dy) < MIN_DRAG) return;
  if (!drag.moved && drag.action !== "draw") remember();
  drag.moved = true;
  if (drag.action === "move") moveTo(drag.region, withClick(byId(drag.region.id).at, drag.click, at));
  else if (drag.action === "resize") moveTo(drag.region, atLeastAPixel(boxOf(drag.from, at)));
  else changed("draft");
}

/** Two fingers zoom and pan. */
function pinch(event) {
  const before = [...touches.values()];
  touches.set(event.pointerId, event);
  const after = [...touches.values()];
  const [was, is] = [before, after].map(([a, b]) => ({
    clientX: (a.clientX + b.clientX) / 2,
    clientY: (a.clientY + b.clientY) / 2,
    apart: Math.max(Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY), 1),
  }));
  zoomBy(is.apart / was.apart, was);
  panBy(is.clientX - was.clientX, is.clientY - was.clientY);
}

/** A box that has some width and height, within the image. */
function atLeastAPixel([x0, y0, x1, y1]) {
  const [x, y] = [Math.min(x0, state.image.width - 1), Math.min(y0, state.image.height - 1)];
  return [Math.max(x, 0), Math.max(y, 0), Math.max(x1, x + 1), Math.max(y1, y + 1)];
}

function pointerUp(event) {
  touches.delete(event.pointerId);
  const { drag } = state;
  if (!drag) return;
  state.drag = null;
  if (drag.action === "pan") return;
  const at = position(event);
  if (drag.action === "draw") drawn(drag, at, event);
  changed("regions");
  shapeOf(state.selected)?.focus({ preventScroll: true, focusVisible: false }); // the keyboard goes on from here
}

/** A drag draws a box; a click makes a point, adds one to the selected region, or selects. */
function drawn(drag, at, event) {
  if (drag.mode === "box" && drag.moved) {
    addRegion("box", atLeastAPixel(boxOf(drag.from, at)));
    return;
  }
  const region = byId(state.selected);
  const kind = region?.kind === "point" && event.altKey ? "exclude" : region?.kind === "point" && event.shiftKey ? "include" : clickKind();
  if (drag.mode === "point" && kind !== "new") {
    addClick(region, at, kind === "include" ? 1 : 0);
    return;
  }
  const found = regionAt(at, event);
  if (drag.mode === "point" && found?.kind !== "point") addRegion("point", [[...at, 1]]);
  else select(found?.id ?? null);
}

export function cancelDrag() {
  const { drag } = state;
  state.drag = null;
  if (drag?.moved && ["move", "resize"].includes(drag.action)) forget();
  changed("draft");
}

function endTouch(event) {
  touches.delete(event.pointerId);
  cancelDrag();
}

export function listenForPointer() {
  const viewport = $("viewport");
  viewport.addEventListener("pointerdown", pointerDown);
  viewport.addEventListener("pointermove", pointerMove);
  viewport.addEventListener("pointerup", pointerUp);
  viewport.addEventListener("pointercancel", endTouch);
  viewport.addEventListener("pointerleave", () => state.drag ?? hover(null));
  viewport.addEventListener("auxclick", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key === " " && event.target === document.body && state.image) {
      event.preventDefault();
      isPanKey = true;
    }
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") isPanKey = false;
  });
}
