// Small helpers to find and make elements.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

export function svgElement(tag, className, parent) {
  const made = document.createElementNS(SVG, tag);
  made.setAttribute("class", className);
  parent?.append(made);
  return made;
}

export function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

/** Sets a text only where it differs: a live region is read aloud at every change. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
