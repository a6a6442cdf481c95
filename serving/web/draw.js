// Brings the page in line with the state. Each change redraws what it must: a move of the pointer touches one region.

import { $ } from "./dom.js";
import { drawTags, drawTagsOf } from "./labels.js";
import { drawActiveMask, drawMasks } from "./layers.js";
import { drawItem, drawList, drawListStates } from "./list.js";
import { drawCurrent, drawProgress } from "./progress.js";
import { canRedo, canUndo } from "./regions.js";
import { drawDraft, drawHandles, drawShape, drawShapeStates, drawShapes, placeShapes } from "./shapes.js";
import { byId, numberOf, state } from "./state.js";

let active = null; // the region that was hovered or selected when it was last drawn

export function draw(parts) {
  const isAll = parts.has("regions");
  if (parts.has("view")) placeShapes();
  if (isAll || parts.has("masks")) drawShapes();
  if (isAll || parts.has("words") || parts.has("threshold")) drawList();
  if (isAll || parts.has("words") || parts.has("threshold") || parts.has("view")) drawTags();
  else if (parts.has("moved") || parts.has("states")) drawTagsOf([active, state.hovered, state.selected].filter((id) => id !== null));
  if (!isAll && (parts.has("moved") || parts.has("states"))) drawSelected();
  if (isAll || parts.has("states")) {
    drawShapeStates();
    drawListStates();
    active = state.hovered ?? state.selected;
  }
  if (isAll || parts.has("moved") || parts.has("masks") || parts.has("view")) drawMasks();
  drawActiveMask();
  drawDraft();
  drawControls();
  if (isAll || parts.has("words") || parts.has("moved")) drawProgress();
  else if (parts.has("states")) drawCurrent();
}

/** The region that is being moved is the selected one; its name tells which of its clicks is the current one. */
function drawSelected() {
  const region = byId(state.selected);
  if (!region) return;
  drawShape(region, numberOf(region));
  drawItem(region, numberOf(region));
  drawHandles();
}

function drawControls() {
  $("undo").disabled = !canUndo();
  $("redo").disabled = !canRedo();
  drawModes();
}

export const mode = () => document.querySelector('input[name="mode"]:checked').value;

/** What a click does: "new", "include" or "exclude". The last two want a region of points. */
export const clickKind = () => (byId(state.selected)?.kind === "point" ? document.querySelector('input[name="click"]:checked').value : "new");

function drawModes() {
  const isPoint = mode() === "point";
  const canRefine = byId(state.selected)?.kind === "point";
  $("click-kinds").hidden = !isPoint;
  for (const input of document.querySelectorAll('input[name="click"]:not([value="new"])')) input.disabled = !canRefine;
  $("add-text").textContent = isPoint ? "Add point" : "Add box";
}
