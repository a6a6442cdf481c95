// Adding, changing and removing regions, and taking that back.

import { clamp, tenths } from "./geometry.js";
import { showProblem } from "./notices.js";
import { byId, changed, flush, state } from "./state.js";

const MAX_STEPS = 200; // that can be undone
const MAX_CLICKS = 15; // of a region: the prompt encoder takes 16, of which one is padding
const NUDGES_S = 1; // keys that follow within that time are undone together

const past = [];
const future = [];
let nextId = 1;
let nudged = { id: null, at: 0 };

const snapshot = () => ({ regions: state.regions, selected: state.selected });

/** Keeps what is there now, to return to. */
export function remember() {
  past.push(snapshot());
  if (past.length > MAX_STEPS) past.shift();
  future.length = 0;
  nudged.id = null;
}

const goBack = (from, to) => {
  if (!from.length || state.drag) return;
  to.push(snapshot());
  restore(from.pop());
};

export const undo = () => goBack(past, future);
export const redo = () => goBack(future, past);
export const canUndo = () => past.length > 0;
export const canRedo = () => future.length > 0;

function restore({ regions, selected }) {
  Object.assign(state, { regions, selected, hovered: null, click: 0 });
  nudged.id = null;
  changed("regions");
  flush();
}

/** Gives up what was done since `remember`. */
export function forget() {
  if (past.length) restore(past.pop());
}

/** Without any region, and nothing to return to. */
export function startOver() {
  past.length = future.length = 0;
  state.answers.clear();
  restore({ regions: [], selected: null });
}

const rounded = (kind, at) => (kind === "box" ? at.map(tenths) : at.map(([x, y, label]) => [tenths(x), tenths(y), label]));

export function addRegion(kind, at) {
  const limit = state.limits?.max_regions ?? Infinity;
  if (state.regions.length >= limit) {
    showProblem(`This server looks at ${limit} regions at most. Remove one first.`);
    return null;
  }
  remember();
  const region = { id: nextId, kind, at: rounded(kind, at) };
  nextId += 1;
  restore({ regions: [...state.regions, region], selected: region.id });
  return region;
}

/** One more click on a region: label 1 for what belongs to it, 0 for what does not. */
export function addClick(region, [x, y], label) {
  if (region.at.length >= MAX_CLICKS) {
    showProblem(`A region has ${MAX_CLICKS} points at most. Remove one first.`);
    return;
  }
  remember();
  moveTo(region, [...region.at, [x, y, label]]);
  state.click = region.at.length;
  flush();
}

export function removeRegion(id) {
  if (!byId(id)) return;
  remember();
  restore({ regions: state.regions.filter((region) => region.id !== id), selected: null });
}

/** Removes the current click of a region that has several. Returns whether it did. */
export function removeClick(region) {
  if (region.kind !== "point" || region.at.length < 2) return false;
  remember();
  moveTo(region, region.at.filter((_, index) => index !== state.click));
  state.click = Math.max(state.click - 1, 0);
  flush();
  return true;
}

export function clearRegions() {
  remember();
  restore({ regions: [], selected: null });
}

/** Puts a region somewhere else: it is drawn there with the next frame. */
export function moveTo(region, at) {
  const moved = { ...region, at: rounded(region.kind, at) };
  state.regions = state.regions.map((one) => (one.id === region.id ? moved : one));
  changed("moved");
}

export const withClick = (at, index, [x, y]) => at.map((click, one) => (one === index ? [x, y, click[2]] : click));

export function select(id, click = 0) {
  if (state.selected === id && state.click === click) return;
  Object.assign(state, { selected: id, click });
  changed("states");
}

export function hover(id) {
  if (state.hovered === id) return;
  state.hovered = id;
  changed("states");
}

/** Moves a region's current click, a box, or the lower right corner of a box by whole steps within the image. */
export function nudge(region, right, down, resize) {
  const now = performance.now();
  const goesOn = nudged.id === region.id && now - nudged.at < NUDGES_S * 1000;
  if (!goesOn) remember();
  nudged = { id: region.id, at: now };
  const { width, height } = state.image;
  const step = Math.max(1, Math.round(Math.max(width, height) / 100));
  const [dx, dy] = [right * step, down * step];
  if (region.kind === "point") {
    const [x, y] = region.at[state.click];
    moveTo(region, withClick(region.at, state.click, [clamp(x + dx, 0, width), clamp(y + dy, 0, height)]));
  } else {
    moveTo(region, nudgedBox(region.at, dx, dy, resize ? step : 0));
  }
  flush();
}

function nudgedBox([x0, y0, x1, y1], dx, dy, least) {
  const { width, height } = state.image;
  if (least) return [x0, y0, clamp(x1 + dx, x0 + least, width), clamp(y1 + dy, y0 + least, height)];
  const [mx, my] = [clamp(dx, -x0, width - x1), clamp(dy, -y0, height - y1)];
  return [x0 + mx, y0 + my, x1 + mx, y1 + my];
}
