// Everything that the pointer does, by keys.

import { $ } from "./dom.js";
import { clickKind, mode } from "./draw.js";
import { boundsOf, clamp } from "./geometry.js";
import { itemOf } from "./list.js";
import { showHint } from "./notices.js";
import { cancelDrag } from "./pointer.js";
import { ask } from "./question.js";
import { addClick, addRegion, nudge, redo, removeClick, removeRegion, select, undo } from "./regions.js";
import { shapeOf } from "./shapes.js";
import { byId, changed, flush, state } from "./state.js";
import { fit, isZoomed, panBy, reveal, zoomIn, zoomOut } from "./view.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PAN = 60; // screen pixels
const HINTS = {
  keys: "Arrow keys move it, with Shift they size a box. Tab goes to the next, Delete removes, Enter asks.",
  clicks: "Arrow keys move the point, Space goes to the region's next one, Delete removes it, Enter asks.",
  box: "Drag to draw a box around something.",
  point: "Click on something.",
  refine: "Click on something else, or refine the selected region: Shift adds a point, Alt excludes one.",
  touch: "Tap something else, or refine the selected region:",
};

export function drawHint() {
  const region = byId(state.selected);
  const isByKeys = document.body.classList.contains("by-keys") && document.activeElement?.closest(".shape");
  if (isByKeys) showHint(region?.kind === "point" && region.at.length > 1 ? HINTS.clicks : HINTS.keys);
  else if (mode() === "box") showHint(HINTS.box);
  else if (region?.kind !== "point") showHint(HINTS.point);
  else showHint(matchMedia("(hover: none)").matches ? HINTS.touch : HINTS.refine);
}

function setMode(value) {
  document.querySelector(`input[name="mode"][value="${value}"]`).checked = true;
  changed("states");
}

/** A region in the middle of the image, or one more point near the selected region's last one. */
export function addInTheMiddle() {
  if (!state.image) return;
  const { width, height } = state.image;
  const kind = clickKind();
  const region = byId(state.selected);
  if (mode() === "point" && kind !== "new") {
    const [x, y] = region.at[region.at.length - 1];
    addClick(region, [clamp(x + width * 0.04, 0, width), y], kind === "include" ? 1 : 0);
    shapeOf(region.id).focus();
    return;
  }
  const shift = (state.regions.length % 5) * 0.04; // so that several do not hide each other
  const at = mode() === "box"
    ? [width * (0.3 + shift), height * (0.3 + shift), width * (0.6 + shift), height * (0.6 + shift)]
    : [[width * (0.5 + shift), height * (0.5 + shift), 1]];
  const added = addRegion(mode(), at);
  if (added) shapeOf(added.id).focus();
}

/** Removes a region, and goes on with the next one where the focus was: on the image or in the list. */
export function removeAndGoOn(id, goOn) {
  const index = state.regions.findIndex((region) => region.id === id);
  if (index < 0) return;
  const inList = document.activeElement?.closest("#regions") !== null;
  removeRegion(id);
  const next = state.regions[Math.min(index, state.regions.length - 1)];
  if (!goOn) return;
  if (!next) {
    $("add").focus();
    return;
  }
  select(next.id);
  flush();
  (inList ? itemOf(next.id).pick : shapeOf(next.id)).focus();
}

function keyDown(event) {
  const isCommand = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && isCommand) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    escape();
  } else if (!event.target.closest("textarea, input:not([type=radio], [type=checkbox]), select")) {
    if (isCommand) command(event);
    else plainKey(event);
  }
}

function command(event) {
  const key = event.key.toLowerCase();
  if (key !== "z" && key !== "y") return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) redo();
  else undo();
}

function escape() {
  if (state.drag) cancelDrag();
  else if (state.asking) state.asking.abort();
  else {
    document.activeElement?.closest(".shape")?.blur();
    select(null);
  }
}

const PLAIN = {
  b: () => setMode("box"),
  p: () => setMode("point"),
  n: addInTheMiddle,
  "+": zoomIn,
  "=": zoomIn,
  "-": zoomOut,
  0: fit,
};

function plainKey(event) {
  if (event.altKey) return;
  const shape = event.target.closest(".shape");
  const pick = event.target.closest(".pick");
  const id = Number((shape ?? pick?.closest(".region"))?.dataset.region) || state.selected;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const isFree = event.target === document.body;
  if (PLAIN[key]) PLAIN[key]();
  else if ((key === "Delete" || key === "Backspace") && id) removeHere(id, shape, pick);
  else if (key === "Enter" && (shape || isFree)) ask();
  else if (key === " " && shape) nextClick(byId(id));
  else if (key in ARROWS && shape) nudge(byId(id), ...ARROWS[key], event.shiftKey);
  else if (key in ARROWS && isFree && isZoomed()) panBy(...ARROWS[key].map((side) => -side * PAN));
  else if (pick && (key === "ArrowDown" || key === "ArrowUp")) goAlongList(pick, key === "ArrowDown" ? 1 : -1);
  else return;
  event.preventDefault();
}

/** On the image a region of several clicks loses the current one; everything else goes as a whole. */
function removeHere(id, shape, pick) {
  if (shape && removeClick(byId(id))) return;
  removeAndGoOn(id, Boolean(shape ?? pick));
}

function nextClick(region) {
  select(region.id, region.kind === "point" ? (state.click + 1) % region.at.length : 0);
}

function goAlongList(pick, step) {
  const picks = [...$("regions").querySelectorAll(".pick")];
  picks[clamp(picks.indexOf(pick) + step, 0, picks.length - 1)].focus();
}

function focusIn({ target }) {
  const shape = target.closest(".shape");
  if (!shape) return;
  const region = byId(Number(shape.dataset.region));
  if (!region) return;
  if (state.selected !== region.id) select(region.id);
  if (document.body.classList.contains("by-keys")) reveal(region.kind === "box" ? region.at : boundsOf(region.at));
  drawHint();
}

export function listenForKeys() {
  document.addEventListener("keydown", keyDown);
  document.addEventListener("keydown", () => document.body.classList.add("by-keys"), true);
  document.addEventListener("pointerdown", () => document.body.classList.remove("by-keys"), true);
  $("viewport").addEventListener("focusin", focusIn);
  $("viewport").addEventListener("focusout", () => setTimeout(drawHint));
}
