// The labels on the image: number, name and score of each region, where they hide the least of each other.

import { $, element } from "./dom.js";
import { boundsOf, clamp, overlap } from "./geometry.js";
import { percent } from "./messages.js";
import { answerOf, colourOf, state } from "./state.js";
import { keyOf, choice } from "./vocabulary.js";
import { view } from "./view.js";

const CROWD = 15; // from so many regions on labels are numbers; the active one has its name
const GAP = 4;
const POINT_RADIUS = 12;

const isCrowd = () => state.regions.length >= CROWD;
const tags = new Map(); // id of a region -> {tag, key, size, spot}

/** A text of at most `most` characters that keeps its first and its last words: names often differ in the last ones. */
export function cutInMiddle(text, most) {
  const characters = [...text];
  if (characters.length <= most) return text;
  const side = Math.max(Math.floor((most - 1) / 2), 1);
  const first = characters.slice(0, side).join("");
  const last = characters.slice(-side).join("");
  return `${first.replace(/\s+\S{0,4}$/, "").trimEnd()}…${last.replace(/^\S{0,4}\s+/, "").trimStart()}`;
}

/** Writes as much of a name as two lines take, and makes them no wider than the longer one. */
function writeName(node, name) {
  node.textContent = name;
  let most = Math.min([...name].length, 200);
  while (node.scrollHeight > node.clientHeight + 1 && most > 8) {
    most = Math.floor(most * 0.92);
    node.textContent = cutInMiddle(name, most);
  }
  const letters = document.createRange();
  letters.selectNodeContents(node);
  const lines = [...letters.getClientRects()];
  if (lines.length > 1) node.style.width = `${Math.ceil(Math.max(...lines.map(({ width }) => width))) + 1}px`;
}

const widthFor = (isActive) => (isActive ? clamp(view.width * 0.75, 150, 340) : clamp(view.width * 0.56, 130, 300));

/** Writes all labels, and places them. */
export function drawTags() {
  $("viewport").classList.toggle("is-crowd", isCrowd());
  const kept = new Set(state.regions.map(({ id }) => id));
  for (const [id, { tag }] of tags) {
    if (kept.has(id)) continue;
    tag.remove();
    tags.delete(id);
  }
  const words = keyOf(choice());
  state.regions.forEach((region, index) => writeTag(region, index + 1, words));
  const order = state.regions.map(({ id }) => tags.get(id).tag);
  if (order.some((tag, index) => $("labels").children[index] !== tag)) $("labels").replaceChildren(...order);
  placeTags();
}

function writeTag(region, number, words) {
  if (!tags.has(region.id)) {
    const tag = element("div", "tag", $("labels"));
    tag.style.setProperty("--c", colourOf(region));
    tags.set(region.id, { tag, key: "", size: null, spot: null });
  }
  const label = tags.get(region.id);
  const isActive = region.id === (state.hovered ?? state.selected);
  const answer = answerOf(region);
  const isNamed = answer && (!isCrowd() || isActive) && (answer.found.score >= state.threshold || isActive);
  const isStale = Boolean(answer) && answer.words !== words;
  const width = widthFor(isActive);
  const { tag } = label;
  const key = JSON.stringify([number, isNamed && answer.found.class, isNamed && answer.found.score, isStale, width]);
  tag.classList.toggle("is-active", isActive);
  if (label.key === key) return;
  Object.assign(label, { key, size: null });
  tag.style.maxWidth = `${width}px`;
  tag.classList.toggle("is-stale", isStale);
  tag.replaceChildren();
  element("b", "", tag, String(number));
  if (!isNamed) return;
  const name = element("span", "", tag);
  element("i", "", tag, percent(answer.found.score));
  writeName(name, answer.found.class);
}

/** Writes and places the labels of some regions among all others, which stay. */
export function drawTagsOf(ids) {
  const words = keyOf(choice());
  for (const id of new Set(ids)) {
    const index = state.regions.findIndex((region) => region.id === id);
    if (index < 0) continue;
    const region = state.regions[index];
    writeTag(region, index + 1, words);
    const others = isCrowd() ? [] : state.regions.filter((one) => one.id !== id).map((one) => tags.get(one.id).spot);
    placeTag(region, others.filter(Boolean));
  }
}

/** Each label above its region, or below, inside or beside it; those of a crowd do not avoid each other. */
export function placeTags() {
  for (const { id } of state.regions) sizeOf(tags.get(id)); // all are measured before any is moved
  const taken = [];
  for (const region of state.regions) {
    const spot = placeTag(region, taken);
    if (spot && !isCrowd()) taken.push(spot);
  }
}

function sizeOf(label) {
  label.size ??= [label.tag.offsetWidth, label.tag.offsetHeight];
  return label.size;
}

function placeTag(region, taken) {
  const label = tags.get(region.id);
  const around = onScreen(region);
  const isSeen = around[2] >= 0 && around[3] >= 0 && around[0] <= view.width && around[1] <= view.height;
  label.tag.classList.toggle("is-away", !isSeen);
  label.spot = isSeen ? bestSpot(around, sizeOf(label), taken) : null;
  if (isSeen) label.tag.style.transform = `translate(${Math.round(label.spot[0])}px, ${Math.round(label.spot[1])}px)`;
  return label.spot;
}

function onScreen({ kind, at }) {
  const [x0, y0, x1, y1] = (kind === "box" ? at : boundsOf(at)).map((value, index) => (
    value * view.scale + (index % 2 ? view.top : view.left)
  ));
  const more = kind === "box" ? 0 : POINT_RADIUS;
  return [x0 - more, y0 - more, x1 + more, y1 + more];
}

/** The box of a label of some size near another box within the viewport, where it hides least of what is taken. */
function bestSpot([x0, y0, x1, y1], [width, height], taken) {
  const [right, bottom] = [Math.max(view.width - width, 0), Math.max(view.height - height, 0)];
  const rows = [y0 - height - GAP, y1 + GAP, y0 + GAP, y1 - height - GAP].filter((y) => y >= 0 && y <= bottom);
  const columns = [x0 - 1, x1 - width + 1, x1 + GAP, x0 - width - GAP];
  const places = columns.flatMap((x) => rows.map((y) => [clamp(x, 0, right), y]));
  if (!places.length) places.push([clamp(x0, 0, right), clamp(y0, 0, bottom)]);
  let best = null;
  let least = Infinity;
  for (const [x, y] of places) {
    const box = [x, y, x + width, y + height];
    const hidden = taken.reduce((sum, other) => sum + overlap(box, other), 0);
    if (hidden < least) [best, least] = [box, hidden];
    if (least === 0) break;
  }
  return best;
}
