// What the page knows, and how its parts hear of changes. All coordinates are pixels of the upright image.

export const state = {
  image: null, // {file, isConverted, name, width, height, handle}; the handle is the server's, once it has seen the image
  regions: [], // {id, kind, at}, never changed but replaced; at: a box [x0, y0, x1, y1], or clicks [[x, y, label], ...]
  selected: null, // id of a region
  hovered: null, // likewise
  click: 0, // which click of the selected region the keyboard moves
  drag: null,
  answers: new Map(), // id of a region -> {at, words, found, outline}: the answer with what it was asked about
  last: null, // {asked, answer, name, words}: the whole of the last answer
  asking: null, // an AbortController
  threshold: 0, // answers of a lower score are shown as unsure
  limits: null,
  vocabularies: [], // {name, count or null, words or null}
};

export const byId = (id) => state.regions.find((region) => region.id === id) ?? null;
export const numberOf = (region) => state.regions.findIndex(({ id }) => id === region.id) + 1;

const COLOURS = ["#ffd166", "#5cc8ff", "#8ce99a", "#ff9fb2", "#cdb4ff", "#ffa94d", "#4fd8c4", "#e4f06a"];
export const colourOf = (region) => COLOURS[(region.id - 1) % COLOURS.length];

/** The answer about a region as it is now: an answer about where it was before does not count. */
export function answerOf(region) {
  const given = state.answers.get(region.id);
  return given && sameAt(given.at, region.at) ? given : null;
}

export function sameAt(a, b) {
  return a === b || (a.length === b.length && a.every((value, index) => (
    Array.isArray(value) ? sameAt(value, b[index]) : value === b[index]
  )));
}

// ---------------------------------------------------------------- changes

const waiting = new Set();
let frame = 0;
let listener = () => {};

/** Says which function draws: it gets the set of what changed. */
export function onChange(draw) {
  listener = draw;
}

/** Has the page drawn again with the next frame, once for all changes until then. */
export function changed(...parts) {
  for (const part of parts) waiting.add(part);
  frame ||= requestAnimationFrame(flush);
}

/** Draws what has changed at once: for whoever goes on with the new elements. */
export function flush() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!waiting.size) return;
  const parts = new Set(waiting);
  waiting.clear();
  listener(parts);
}
