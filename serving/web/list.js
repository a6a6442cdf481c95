// The list of regions with their answers.

import { $, element, setText } from "./dom.js";
import { describe, percent } from "./messages.js";
import { hover, select } from "./regions.js";
import { answerOf, colourOf, state } from "./state.js";
import { choice, keyOf } from "./vocabulary.js";

const LONG = 15; // from so many regions on only the selected one shows more than its first name

const items = new Map(); // id of a region -> {item, pick, remove, bars, key}

export const itemOf = (id) => items.get(id);

export function drawList() {
  const kept = new Set(state.regions.map(({ id }) => id));
  for (const [id, { item }] of items) {
    if (kept.has(id)) continue;
    item.remove();
    items.delete(id);
  }
  const words = keyOf(choice());
  state.regions.forEach((region, index) => drawItem(region, index + 1, words));
  const order = state.regions.map(({ id }) => items.get(id).item);
  if (order.some((item, index) => $("regions").children[index] !== item)) $("regions").replaceChildren(...order);
  const count = state.regions.length;
  setText($("count"), count ? `(${count})` : "");
  $("no-regions").hidden = count > 0;
  $("clear").hidden = count === 0;
  $("regions").classList.toggle("is-long", count > 4);
}

function makeItem(region) {
  const item = element("li", "region", $("regions"));
  item.dataset.region = region.id;
  item.style.setProperty("--c", colourOf(region));
  const head = element("div", "region-head", item);
  const pick = element("button", "pick", head);
  const remove = element("button", "remove", head, "×");
  pick.type = remove.type = "button";
  const bars = element("ul", "bars", item);
  pick.addEventListener("click", () => select(region.id));
  pick.addEventListener("focus", () => select(region.id, state.selected === region.id ? state.click : 0));
  item.addEventListener("pointerenter", () => hover(region.id));
  item.addEventListener("pointerleave", () => hover(null));
  return { item, pick, remove, bars, key: "" };
}

/** Writes an item where something of it differs. */
export function drawItem(region, number, words = keyOf(choice())) {
  if (!items.has(region.id)) items.set(region.id, makeItem(region));
  const view = items.get(region.id);
  const answer = answerOf(region);
  const label = describe(region, number, answer);
  const isOpen = state.regions.length < LONG || state.selected === region.id;
  const isUnsure = Boolean(answer) && answer.found.score < state.threshold;
  const isStale = Boolean(answer) && answer.words !== words;
  const name = answer ? answer.found.class : unasked(region);
  const key = JSON.stringify([label, name, answer?.serial, isOpen, isUnsure, isStale]);
  if (key === view.key) return;
  view.key = key;
  view.item.classList.toggle("is-unsure", isUnsure);
  view.item.classList.toggle("is-stale", isStale);
  view.pick.setAttribute("aria-label", label + (isStale ? ", asked with other words" : ""));
  view.remove.setAttribute("aria-label", `Remove region ${number}`);
  view.pick.replaceChildren();
  element("span", "number", view.pick, String(number));
  if (answer) drawRow(view.pick, name, answer.found.score);
  else element("span", "name is-open", view.pick, name);
  const others = answer && isOpen ? answer.found.top.slice(1) : [];
  view.bars.hidden = others.length === 0;
  view.bars.replaceChildren();
  for (const [name, score] of others) drawRow(element("li", "", view.bars), name, score);
}

function unasked(region) {
  const what = region.kind === "box" ? "Box" : region.at.length > 1 ? `${region.at.length} points` : "Point";
  return state.answers.has(region.id) ? `${what}, moved since it was asked` : `${what}, not asked yet`;
}

/** A name and its score in a row whose ground is their bar. */
function drawRow(parent, name, score) {
  const meter = element("span", "meter", parent);
  meter.setAttribute("aria-hidden", "true");
  element("span", "", meter).style.transform = `scaleX(${score})`;
  element("span", "name", parent, name);
  element("span", "score", parent, percent(score));
}

export function drawListStates() {
  const active = state.hovered ?? state.selected;
  state.regions.forEach((region, index) => {
    const { item, pick } = items.get(region.id);
    const isSelected = region.id === state.selected;
    if (isSelected !== item.classList.contains("is-selected")) {
      item.classList.toggle("is-selected", isSelected);
      pick.setAttribute("aria-pressed", String(isSelected));
      drawItem(region, index + 1);
    } else if (isSelected) {
      drawItem(region, index + 1); // another click may be the current one
    }
    item.classList.toggle("is-active", region.id === active);
  });
}
