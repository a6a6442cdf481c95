// Boxes and clicks on the image, as SVG in pixels of the image: a zoom changes one transformation, a move one shape.

import { $, setAll, svgElement } from "./dom.js";
import { area, boxOf, cornersOf } from "./geometry.js";
import { describe } from "./messages.js";
import { answerOf, byId, colourOf, state } from "./state.js";
import { view } from "./view.js";

const shapes = new Map(); // id of a region -> its element
const drawn = new WeakMap(); // an element -> what it shows

export const shapeOf = (id) => shapes.get(id);

/** Brings all shapes in line with the regions. Elements stay, so that the focus does. */
export function drawShapes() {
  const kept = new Set(state.regions.map(({ id }) => id));
  for (const [id, shape] of shapes) {
    if (kept.has(id)) continue;
    shape.remove();
    shapes.delete(id);
  }
  state.regions.forEach((region, index) => {
    if (!shapes.has(region.id)) shapes.set(region.id, makeShape(region));
    drawShape(region, index + 1);
  });
  const order = state.regions.map(({ id }) => shapes.get(id));
  if (order.some((shape, index) => $("shape-list").children[index] !== shape)) $("shape-list").replaceChildren(...order);
}

function makeShape(region) {
  const shape = svgElement("g", "shape", $("shape-list"));
  setAll(shape, { tabindex: "0", role: "button", "data-region": region.id });
  shape.style.setProperty("--c", colourOf(region));
  return shape;
}

/** Draws a shape where something of it differs. */
export function drawShape(region, number) {
  const shape = shapes.get(region.id);
  const answer = answerOf(region);
  const now = { region, label: describe(region, number, answer), outline: answer?.outline };
  const before = drawn.get(shape);
  if (before && before.region === region && before.label === now.label && before.outline === now.outline) return;
  drawn.set(shape, now);
  setAll(shape, { "aria-label": now.label });
  shape.classList.toggle("has-mask", Boolean(answer?.outline));
  if (region.kind === "box") {
    for (const part of ["fill", "halo", "line"]) placeRect(partOf(shape, "rect", part), region.at);
    return;
  }
  const found = answer && area(answer.found.box) > 0 ? answer.found.box : null;
  if (found) placeRect(partOf(shape, "rect", "found"), found);
  else shape.querySelector(".found")?.remove();
  const clicks = [...shape.querySelectorAll(".click")];
  while (clicks.length < region.at.length) clicks.push(makeClick(shape));
  for (const spare of clicks.splice(region.at.length)) spare.remove();
  region.at.forEach((click, index) => placeClick(clicks[index], click));
}

function partOf(shape, tag, className) {
  return shape.querySelector(`:scope > .${className}`) ?? svgElement(tag, className, shape);
}

function placeRect(rect, [x0, y0, x1, y1]) {
  setAll(rect, { x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0) });
}

function makeClick(shape) {
  const click = svgElement("g", "click", shape);
  setAll(svgElement("circle", "disc", click), { r: 8 });
  svgElement("path", "sign", click);
  return click;
}

function placeClick(click, [x, y, label]) {
  click.style.setProperty("--x", `${x}px`);
  click.style.setProperty("--y", `${y}px`);
  click.classList.toggle("is-excluded", label === 0);
  setAll(click.querySelector(".sign"), { d: label ? "M-4 0H4M0 -4V4" : "M-4 0H4" });
}

/** Which shapes are active and selected, and the handles of the selected box. */
export function drawShapeStates() {
  const active = state.hovered ?? state.selected;
  $("shapes").classList.toggle("has-hover", state.hovered !== null);
  for (const [id, { classList, children }] of shapes) {
    classList.toggle("is-active", id === active);
    classList.toggle("is-selected", id === state.selected);
    const clicks = [...children].filter((child) => child.classList.contains("click"));
    clicks.forEach((click, index) => {
      click.classList.toggle("is-current", clicks.length > 1 && id === state.selected && index === state.click);
    });
  }
  drawHandles();
}

export function drawHandles() {
  const region = byId(state.selected);
  const handles = [...$("handles").children];
  const corners = region?.kind === "box" ? cornersOf(region.at) : [];
  $("handles").classList.toggle("is-shown", corners.length > 0);
  corners.forEach(([x, y], index) => {
    handles[index].style.setProperty("--x", `${x}px`);
    handles[index].style.setProperty("--y", `${y}px`);
  });
}

/** The box that is being drawn. */
export function drawDraft() {
  const { drag } = state;
  const isDrawn = drag?.action === "draw" && drag.moved && drag.mode === "box";
  $("draft").classList.toggle("is-shown", isDrawn);
  if (!isDrawn) return;
  for (const rect of $("draft").children) placeRect(rect, boxOf(drag.from, drag.to));
}

/** Follows the image on the screen. */
export function placeShapes() {
  setAll($("shape-layer"), { transform: `translate(${view.left} ${view.top}) scale(${view.scale})` });
  $("shape-layer").style.setProperty("--unit", String(1 / view.scale));
}
