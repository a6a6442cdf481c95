// The page: a picture, regions drawn on it, a question about them, and the answers. No framework, no build step.
// All coordinates of regions are pixels of the upright picture; only `place` and `position` know the screen's.

const TOP_K = 5;
const COLOURS = ["#ffd166", "#5cc8ff", "#8ce99a", "#ff9fb2", "#cdb4ff", "#ffa94d", "#4fd8c4", "#e4f06a"];
const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp"];
const MASK_SIDE = 1024; // longest side of the canvas that masks are painted on
const MIN_DRAG = 4; // screen pixels; less is a click
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

const state = {
  file: null, // what is sent: a Blob
  fileName: "",
  width: 0,
  height: 0,
  handle: null, // what the server calls the picture, once it has seen it
  regions: [], // {id, kind: "box" | "point", at: [x0, y0, x1, y1] or [x, y], answer, mask}
  selected: null, // ids
  hovered: null,
  drag: null,
  asking: null, // an AbortController
  limits: null,
  nextId: 1,
};

// ---------------------------------------------------------------- the server

class Refusal extends Error {
  constructor(code, message, requestId = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { code, requestId, retryAfter });
  }
}

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("NETWORK", "");
  }
  if (response.status === 401 && (await askForToken(Boolean(token)))) return call(path, options);
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  const { code = "INTERNAL", message = "", request_id: requestId = "" } = content.error ?? {};
  throw new Refusal(code, message, requestId, Number(response.headers.get("Retry-After")) || 0);
}

function post(question, file, signal) {
  const form = new FormData();
  form.append("request", JSON.stringify(question));
  if (file) form.append("image", file, state.fileName);
  return call("v1/recognize", { method: "POST", body: form, signal });
}

/** Asks with the picture's handle where there is one, and with the picture where the server has forgotten it. */
async function recognize(question, signal) {
  if (state.handle) {
    try {
      return await post({ ...question, image_handle: state.handle }, null, signal);
    } catch (error) {
      if (error.code !== "IMAGE_UNKNOWN") throw error;
      state.handle = null;
    }
  }
  return post(question, state.file, signal);
}

let tokenAsked = null;

/** Resolves to whether there is a new token to try. */
function askForToken(wasWrong) {
  tokenAsked ??= new Promise((resolve) => {
    const dialog = $("token-dialog");
    $("token-title").textContent = wasWrong ? "That was not the token" : "This server wants a token";
    $("token").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const token = dialog.returnValue === "given" ? $("token").value.trim() : "";
      if (token) sessionStorage.setItem("token", token);
      else sessionStorage.removeItem("token");
      tokenAsked = null;
      resolve(token !== "");
    }, { once: true });
    dialog.showModal();
  });
  return tokenAsked;
}

async function loadInfo() {
  try {
    const info = await call("v1/info");
    state.limits = info.limits;
    $("model").dataset.state = "up";
    $("model-name").textContent = `${info.model} · ${info.runtime} ${info.precision}`;
    showVocabularies(info.vocabularies);
  } catch (error) {
    $("model").dataset.state = "down";
    const locked = error.code === "UNAUTHORIZED";
    $("model-name").textContent = locked ? "A token is needed" : "The model server is not there";
    if (!locked) setTimeout(loadInfo, 5000);
  }
}

function showVocabularies(vocabularies) {
  const options = vocabularies.map(({ name, words }) => new Option(`${name} (${words} words)`, name));
  const chosen = $("source").value;
  $("source").replaceChildren(new Option("My own words", ""), ...options);
  $("source").value = vocabularies.some(({ name }) => name === chosen) ? chosen : "";
  showSource();
}

// ---------------------------------------------------------------- what is said

const SAID = {
  NETWORK: () => "The server behind this page does not answer. Check the connection, then ask again.",
  OVERLOADED: ({ retryAfter }) => `The server is busy. Ask again in ${seconds(retryAfter || 2)}.`,
  UNAVAILABLE: () => "The model server cannot be reached at the moment. It may be starting: ask again in a few seconds.",
  TIMEOUT: () => "No answer came in time. Ask again, or for fewer regions or without masks.",
  INTERNAL: ({ requestId }) => `The server failed. Its log says why${requestId ? `, under request ${requestId}` : ""}.`,
  UNAUTHORIZED: () => "This server wants a token. Ask again to enter it.",
};

const seconds = (count) => (count === 1 ? "a second" : `${count} seconds`);
const percent = (score) => (score > 0 && score < 0.005 ? "<1%" : `${Math.round(score * 100)}%`);
const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");

/** The server counts boxes and clicks from 0, apart; the page numbers all of them from 1. */
function withOurNumbers(message) {
  return message.replace(/\b(box|point) (\d+) \[[^\]]*\]/, (whole, kind, index) => {
    const region = state.regions.filter((one) => one.kind === kind)[Number(index)];
    return region ? `Region ${numberOf(region)}` : whole;
  });
}

function showProblem(text) {
  $("problem").textContent = text;
  if (!text) return;
  $("status").textContent = "";
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("problem").scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

function explain(error) {
  if (!(error instanceof Refusal)) {
    console.error(error);
    return "Something went wrong in this page. Reload it and try again.";
  }
  return SAID[error.code]?.(error) ?? sentence(withOurNumbers(error.message));
}

function showHint(text) {
  $("hint").textContent = text;
}

// ---------------------------------------------------------------- the picture

async function usePicture(file, name) {
  showProblem("");
  try {
    await showPhoto(file);
  } catch {
    showProblem("That file is no picture that this browser can show. Choose a JPEG, PNG or WebP file.");
    return false;
  }
  const photo = $("photo");
  state.file = SENT_AS_THEY_ARE.includes(file.type) ? file : await asPng(photo);
  const limit = state.limits?.max_image_bytes;
  Object.assign(state, {
    fileName: name || "picture",
    width: photo.naturalWidth,
    height: photo.naturalHeight,
    handle: null,
    regions: [],
    selected: null,
    hovered: null,
    drag: null,
  });
  state.asking?.abort();
  $("status").textContent = "";
  $("stage").style.setProperty("--ratio", String(state.width / state.height));
  $("stage").style.setProperty("--natural-w", String(Math.max(state.width, 240)));
  photo.alt = name ? `Your picture, ${name}` : "Your picture";
  for (const id of ["stage", "tools", "hint"]) $(id).hidden = false;
  $("empty").hidden = true;
  showMode();
  draw();
  if (limit && state.file.size > limit) {
    showProblem(`That picture has ${megabytes(state.file.size)}, and this server takes ${megabytes(limit)}. Scale it down first.`);
  }
  return true;
}

const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;

function showPhoto(file) {
  const photo = $("photo");
  const url = URL.createObjectURL(file);
  return new Promise((resolve, reject) => {
    const probe = new Image();
    probe.onload = async () => {
      if (photo.src) URL.revokeObjectURL(photo.src);
      photo.src = url;
      await photo.decode();
      resolve();
    };
    probe.onerror = () => {
      URL.revokeObjectURL(url);
      reject(new Error("no picture"));
    };
    probe.src = url;
  });
}

/** What the browser shows, as a file that the server reads the same way. */
function asPng(photo) {
  const canvas = document.createElement("canvas");
  canvas.width = photo.naturalWidth;
  canvas.height = photo.naturalHeight;
  canvas.getContext("2d").drawImage(photo, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** A few toys on a grey ground, with boxes around them and words to choose from. */
async function useSample() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [384, 256];
  const paint = canvas.getContext("2d");
  paint.fillStyle = "#8d8a86";
  paint.fillRect(0, 0, 384, 256);
  for (let index = 0; index < 500; index += 1) {
    const [x, y] = [(index * 97) % 401, (index * 61) % 263];
    paint.fillStyle = index % 2 ? "rgb(255 255 255 / 5%)" : "rgb(0 0 0 / 5%)";
    paint.fillRect(x - 12, y - 4, 10 + (index % 23), 4 + (index % 9));
  }
  drawToy(paint, "rgb(45 150 60)", null, () => paint.arc(92, 92, 46, 0, 7));
  drawToy(paint, "rgb(205 35 40)", "rgb(35 65 195)", () => paint.rect(226, 40, 92, 92));
  drawToy(paint, "rgb(245 222 60)", null, () => {
    paint.moveTo(190, 150);
    paint.lineTo(244, 236);
    paint.lineTo(136, 236);
  });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!(await usePicture(blob, "sample.png"))) return;
  for (const box of [[46, 46, 138, 138], [226, 40, 318, 132], [136, 150, 244, 236]]) addRegion("box", box);
  if (!$("words").value.trim()) {
    $("words").value = "plain green toy, plain yellow toy, plain blue toy, red toy with blue stripes, red toy with white dots";
    showSource();
  }
  select(null);
  $("ask").focus();
}

function drawToy(paint, base, stripes, outline) {
  paint.save();
  paint.beginPath();
  outline();
  paint.clip();
  paint.fillStyle = base;
  paint.fillRect(0, 0, 384, 256);
  if (stripes) {
    paint.fillStyle = stripes;
    for (let x = -256; x < 640; x += 30) {
      paint.beginPath();
      paint.moveTo(x, 0);
      paint.lineTo(x + 13, 0);
      paint.lineTo(x + 109, 256);
      paint.lineTo(x + 96, 256);
      paint.fill();
    }
  }
  paint.restore();
}

// ---------------------------------------------------------------- regions

const numberOf = (region) => state.regions.indexOf(region) + 1;
const byId = (id) => state.regions.find((region) => region.id === id) ?? null;
const colourOf = (region) => COLOURS[(region.id - 1) % COLOURS.length];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const tenths = (value) => Math.round(value * 10) / 10;

function addRegion(kind, at) {
  const limit = state.limits?.max_regions ?? Infinity;
  if (state.regions.length >= limit) {
    showProblem(`This server looks at ${limit} regions at most. Remove one first.`);
    return null;
  }
  const region = { id: state.nextId, kind, at: at.map(tenths), answer: null, mask: null };
  state.nextId += 1;
  state.regions.push(region);
  state.selected = region.id;
  draw();
  return region;
}

function addInTheMiddle() {
  if (!state.file) return;
  const { width, height } = state;
  const shift = (state.regions.length % 5) * 0.04; // so that several do not hide each other
  const at = mode() === "box"
    ? [width * (0.3 + shift), height * (0.3 + shift), width * (0.6 + shift), height * (0.6 + shift)]
    : [width * (0.5 + shift), height * (0.5 + shift)];
  const region = addRegion(mode(), at);
  if (region) views.get(region.id).shape.focus();
}

function removeRegion(id, focusNext) {
  const index = state.regions.findIndex((region) => region.id === id);
  if (index < 0) return;
  const inList = document.activeElement?.closest("#regions") !== null;
  state.regions.splice(index, 1);
  const next = state.regions[Math.min(index, state.regions.length - 1)];
  if (state.hovered === id) state.hovered = null;
  state.selected = focusNext && next ? next.id : null;
  draw();
  if (!focusNext) return;
  if (next) (inList ? views.get(next.id).pick : views.get(next.id).shape).focus();
  else $("add").focus();
}

function clearRegions() {
  Object.assign(state, { regions: [], selected: null, hovered: null });
  draw();
}

function select(id) {
  state.selected = id;
  drawStates();
}

function hover(id) {
  if (state.hovered === id) return;
  state.hovered = id;
  drawStates();
}

/** Moves a region, or the lower right corner of a box, by whole steps within the picture. */
function nudge(region, right, down, resize) {
  const step = Math.max(1, Math.round(Math.max(state.width, state.height) / 100));
  const [dx, dy] = [right * step, down * step];
  if (region.kind === "point") {
    moveTo(region, [clamp(region.at[0] + dx, 0, state.width), clamp(region.at[1] + dy, 0, state.height)]);
    return;
  }
  const [x0, y0, x1, y1] = region.at;
  if (resize) {
    moveTo(region, [x0, y0, clamp(x1 + dx, x0 + step, state.width), clamp(y1 + dy, y0 + step, state.height)]);
    return;
  }
  const [mx, my] = [clamp(dx, -x0, state.width - x1), clamp(dy, -y0, state.height - y1)];
  moveTo(region, [x0 + mx, y0 + my, x1 + mx, y1 + my]);
}

function moveTo(region, at) {
  Object.assign(region, { at: at.map(tenths), answer: null, mask: null });
  draw();
}

// ---------------------------------------------------------------- drawing

const views = new Map(); // id of a region -> its elements

const scale = () => $("stage").clientWidth / (state.width || 1);

function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function svgElement(tag, className, parent) {
  const made = document.createElementNS(SVG, tag);
  made.setAttribute("class", className);
  parent?.append(made);
  return made;
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

function makeView(region) {
  const shape = svgElement("g", "shape", $("shapes"));
  setAll(shape, { tabindex: "0", role: "button", "data-region": region.id });
  const item = element("li", "region", null);
  item.dataset.region = region.id;
  const head = element("div", "region-head", item);
  const pick = element("button", "pick", head);
  const remove = element("button", "remove", head, "×");
  pick.type = remove.type = "button";
  const bars = element("ul", "bars", item);
  const tag = element("div", "tag", $("labels"));
  for (const node of [shape, item, tag]) node.style.setProperty("--c", colourOf(region));
  pick.addEventListener("click", () => select(region.id));
  remove.addEventListener("click", () => removeRegion(region.id, true));
  for (const node of [shape, pick]) {
    node.addEventListener("focus", () => {
      if (state.selected !== region.id) select(region.id);
    });
  }
  item.addEventListener("pointerenter", () => hover(region.id));
  item.addEventListener("pointerleave", () => hover(null));
  return { shape, item, pick, remove, bars, tag };
}

/** Brings everything on the page in line with `state`. Elements stay, so that the focus does. */
function draw() {
  for (const [id, view] of views) {
    if (byId(id)) continue;
    for (const node of [view.shape, view.item, view.tag]) node.remove();
    views.delete(id);
  }
  for (const region of state.regions) {
    if (!views.has(region.id)) views.set(region.id, makeView(region));
    const view = views.get(region.id);
    drawShape(region, view.shape);
    drawItem(region, view);
    drawTag(region, view.tag);
    if (view.item.parentNode !== $("regions")) $("regions").append(view.item);
  }
  const count = state.regions.length;
  $("count").textContent = count ? `(${count})` : "";
  $("no-regions").hidden = count > 0;
  $("regions").classList.toggle("is-long", count > 4);
  $("clear").disabled = count === 0;
  drawDraft();
  drawStates();
}

function drawStates() {
  const active = state.hovered ?? state.selected;
  for (const region of state.regions) {
    const view = views.get(region.id);
    const faint = state.hovered !== null && region.id !== state.hovered;
    for (const node of [view.shape, view.item, view.tag]) {
      node.classList.toggle("is-active", region.id === active);
      if (node !== view.item) node.classList.toggle("is-faint", faint);
    }
    for (const node of [view.shape, view.item]) node.classList.toggle("is-selected", region.id === state.selected);
    view.pick.setAttribute("aria-pressed", String(region.id === state.selected));
  }
  placeTags();
  drawMasks();
}

function describe(region) {
  const at = region.at.map(Math.round);
  const where = region.kind === "box" ? `box from ${at[0]}, ${at[1]} to ${at[2]}, ${at[3]}` : `point at ${at[0]}, ${at[1]}`;
  const what = region.answer ? `${region.answer.class}, ${percent(region.answer.score)}` : "not asked yet";
  return `Region ${numberOf(region)}, ${where}: ${what}`;
}

function place(box) {
  const factor = scale();
  const [x, y, right, bottom] = box.map((value) => value * factor);
  return { x, y, width: Math.max(right - x, 0), height: Math.max(bottom - y, 0) };
}

function drawShape(region, shape) {
  shape.setAttribute("aria-label", describe(region));
  shape.classList.toggle("has-mask", region.mask !== null);
  shape.replaceChildren();
  if (region.kind === "box") {
    const rect = place(region.at);
    for (const part of ["fill", "halo", "line"]) setAll(svgElement("rect", part, shape), { ...rect, rx: 2 });
    for (const [x, y] of corners(rect)) {
      setAll(svgElement("rect", "handle", shape), { x: x - 5, y: y - 5, width: 10, height: 10, rx: 2 });
    }
    return;
  }
  if (region.answer && area(region.answer.box) > 0) {
    setAll(svgElement("rect", "found", shape), place(region.answer.box));
  }
  const factor = scale();
  const centre = { cx: region.at[0] * factor, cy: region.at[1] * factor };
  setAll(svgElement("circle", "halo", shape), { ...centre, r: 9 });
  setAll(svgElement("circle", "line", shape), { ...centre, r: 9 });
  setAll(svgElement("circle", "dot-mark", shape), { ...centre, r: 5 });
}

const area = ([x0, y0, x1, y1]) => Math.max(x1 - x0, 0) * Math.max(y1 - y0, 0);
const corners = ({ x, y, width, height }) => [[x, y], [x + width, y], [x, y + height], [x + width, y + height]];

function drawItem(region, view) {
  const { answer } = region;
  view.pick.replaceChildren();
  element("span", "number", view.pick, String(numberOf(region)));
  element("span", answer ? "name" : "name is-open", view.pick, answer ? answer.class : `${region.kind === "box" ? "Box" : "Point"}, not asked yet`);
  element("span", "score", view.pick, answer ? percent(answer.score) : "");
  view.pick.setAttribute("aria-label", describe(region));
  view.remove.setAttribute("aria-label", `Remove region ${numberOf(region)}`);
  view.bars.hidden = !answer;
  view.bars.replaceChildren();
  for (const [index, [name, score]] of (answer?.top ?? []).entries()) {
    const row = element("li", "", view.bars);
    element("span", index ? "" : "unseen", row, name); // the first stands above, large
    element("em", index ? "" : "unseen", row, percent(score));
    const meter = element("span", "meter", row);
    element("span", "", meter).style.transform = `scaleX(${score})`;
  }
}

function drawTag(region, tag) {
  tag.replaceChildren();
  element("b", "", tag, String(numberOf(region)));
  if (!region.answer) return;
  element("span", "", tag, region.answer.class);
  element("i", "", tag, percent(region.answer.score));
}

/** Each label above its region, or below, inside or beside it: where it hides the least of the others. */
function placeTags() {
  const taken = [];
  for (const region of state.regions) {
    const { tag } = views.get(region.id);
    const size = { width: tag.offsetWidth, height: tag.offsetHeight };
    const spots = spotsAround(region, size).map((spot) => ({ ...spot, ...size }));
    const hidden = spots.map((spot) => taken.reduce((sum, other) => sum + overlap(spot, other), 0));
    const best = spots[hidden.indexOf(Math.min(...hidden))];
    taken.push(best);
    tag.style.transform = `translate(${Math.round(best.x)}px, ${Math.round(best.y)}px)`;
  }
}

/** Top left corners of labels near a region, within the stage, the best first. */
function spotsAround(region, { width, height }) {
  const stage = $("stage");
  const [right, bottom] = [Math.max(stage.clientWidth - width, 0), Math.max(stage.clientHeight - height, 0)];
  const radius = 12 / scale();
  const [px, py] = region.at;
  const rect = place(region.kind === "box" ? region.at : [px - radius, py - radius, px + radius, py + radius]);
  const under = rect.y + rect.height;
  const rows = [rect.y - height - 4, under + 4, rect.y + 3, under - height - 3].filter((y) => y >= 0 && y <= bottom);
  const columns = [rect.x - 1, rect.x + rect.width - width + 1, rect.x + rect.width + 4, rect.x - width - 4];
  const spots = columns.flatMap((x) => rows.map((y) => ({ x: clamp(x, 0, right), y })));
  return spots.length ? spots : [{ x: clamp(rect.x, 0, right), y: clamp(rect.y, 0, bottom) }];
}

/** Of two rectangles: the area that they share. */
const overlap = (a, b) => (
  Math.max(Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x), 0)
  * Math.max(Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y), 0)
);

function drawDraft() {
  for (const node of $("shapes").querySelectorAll(".draft, .draft-halo")) node.remove();
  if (state.drag?.action !== "draw" || !state.drag.moved || mode() !== "box") return;
  const rect = place(boxOf(state.drag.from, state.drag.to));
  for (const part of ["draft-halo", "draft"]) setAll(svgElement("rect", part, $("shapes")), rect);
}

// ---------------------------------------------------------------- masks

/** Lengths of the runs of a mask, 0s first, from COCO's compressed text: 6 bits a character, 5 of them a number's. */
function runsOf(text) {
  const runs = [];
  let position = 0;
  while (position < text.length) {
    let [value, shift, bits] = [0, 0, 0];
    do {
      bits = text.charCodeAt(position) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
      position += 1;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift; // negative
    if (runs.length > 2) value += runs[runs.length - 2]; // a difference from the run before last
    runs.push(value);
  }
  return runs;
}

/** A mask as a canvas in a region's colour: its inside pale, its border strong. */
function paintMask(mask, colour) {
  const factor = Math.min(1, MASK_SIDE / Math.max(...mask.size));
  const [rows, columns] = mask.size.map((side) => Math.max(1, Math.round(side * factor)));
  const inside = sampleMask(mask, rows, columns);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const paint = canvas.getContext("2d");
  const pixels = paint.createImageData(columns, rows);
  const rgb = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  for (let at = 0; at < inside.length; at += 1) {
    if (!inside[at]) continue;
    const border = !(inside[at - 1] && inside[at + 1] && inside[at - columns] && inside[at + columns]);
    pixels.data.set([...rgb, border ? 235 : 95], at * 4);
  }
  paint.putImageData(pixels, 0, 0);
  return canvas;
}

/** (rows x columns) of 0 and 1, row by row. Runs go down the columns of the mask: one walk along them meets every sample. */
function sampleMask({ size: [height, width], counts }, rows, columns) {
  const inside = new Uint8Array(rows * columns);
  const runs = runsOf(counts);
  let run = 0;
  let end = runs[0] ?? 0;
  for (let column = 0; column < columns; column += 1) {
    const first = Math.floor((column + 0.5) / columns * width) * height;
    for (let row = 0; row < rows; row += 1) {
      const at = first + Math.floor((row + 0.5) / rows * height);
      while (end <= at && run < runs.length - 1) {
        run += 1;
        end += runs[run];
      }
      inside[row * columns + column] = run % 2 && at < end;
    }
  }
  return inside;
}

function drawMasks() {
  const canvas = $("masks");
  const painted = state.regions.filter((region) => region.mask);
  if (!painted.length) {
    canvas.width = canvas.height = 1;
    return;
  }
  [canvas.width, canvas.height] = [painted[0].mask.width, painted[0].mask.height];
  const paint = canvas.getContext("2d");
  for (const region of painted) {
    paint.globalAlpha = state.hovered === null || region.id === state.hovered ? 1 : 0.25;
    paint.drawImage(region.mask, 0, 0);
  }
}

// ---------------------------------------------------------------- mouse, pen and finger

const mode = () => document.querySelector('input[name="mode"]:checked').value;

function showMode() {
  showHint(mode() === "box" ? "Drag to draw a box around something." : "Click on something.");
}

function setMode(value) {
  document.querySelector(`input[name="mode"][value="${value}"]`).checked = true;
  showMode();
}

/** Of a pointer event, in pixels of the picture. */
function position(event) {
  const bounds = $("stage").getBoundingClientRect();
  const [x, y] = [(event.clientX - bounds.left) / bounds.width, (event.clientY - bounds.top) / bounds.height];
  return [clamp(x, 0, 1) * state.width, clamp(y, 0, 1) * state.height];
}

const boxOf = ([ax, ay], [bx, by]) => [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
const distance = ([ax, ay], [bx, by]) => Math.hypot(ax - bx, ay - by) * scale();
const reach = (event) => (event.pointerType === "mouse" ? 9 : 20); // screen pixels around a handle or point

/** What can be gripped at a place: a corner of the selected box, or the selected point. */
function gripAt(at, event) {
  const region = byId(state.selected);
  if (!region) return null;
  if (region.kind === "point") return distance(at, region.at) <= reach(event) ? { action: "move", region } : null;
  const [x0, y0, x1, y1] = region.at;
  const opposite = [[[x0, y0], [x1, y1]], [[x1, y0], [x0, y1]], [[x0, y1], [x1, y0]], [[x1, y1], [x0, y0]]];
  const found = opposite.find(([corner]) => distance(at, corner) <= reach(event));
  return found ? { action: "resize", region, from: found[1] } : null;
}

/** The region at a place: a point nearby, or else the smallest box around it. */
function regionAt(at, event) {
  const points = state.regions.filter((region) => region.kind === "point" && distance(at, region.at) <= reach(event));
  if (points.length) return points[points.length - 1];
  const around = state.regions.filter(({ kind, at: [x0, y0, x1, y1] }) => (
    kind === "box" && x0 <= at[0] && at[0] <= x1 && y0 <= at[1] && at[1] <= y1
  ));
  return around.sort((a, b) => area(a.at) - area(b.at))[0] ?? null;
}

function pointerDown(event) {
  if (event.button !== 0 || !event.isPrimary) return;
  event.preventDefault(); // the focus goes where we say
  if (document.activeElement?.matches("textarea, select")) document.activeElement.blur();
  const at = position(event);
  state.drag = { action: "draw", from: at, ...gripAt(at, event), down: [event.clientX, event.clientY], to: at, moved: false };
  $("stage").setPointerCapture(event.pointerId);
}

function pointerMove(event) {
  const at = position(event);
  const { drag } = state;
  if (!drag) {
    $("stage").classList.toggle("is-over-handle", gripAt(at, event) !== null);
    if (event.pointerType === "mouse") hover(regionAt(at, event)?.id ?? null);
    return;
  }
  drag.to = at;
  drag.moved ||= Math.hypot(event.clientX - drag.down[0], event.clientY - drag.down[1]) >= MIN_DRAG;
  if (!drag.moved) return;
  if (drag.action === "move") moveTo(drag.region, at);
  else if (drag.action === "resize") moveTo(drag.region, atLeastAPixel(boxOf(drag.from, at)));
  else drawDraft();
}

/** A box that has some width and height, within the picture. */
function atLeastAPixel([x0, y0, x1, y1]) {
  const [x, y] = [Math.min(x0, state.width - 1), Math.min(y0, state.height - 1)];
  return [Math.max(x, 0), Math.max(y, 0), Math.max(x1, x + 1), Math.max(y1, y + 1)];
}

function pointerUp(event) {
  const { drag } = state;
  if (!drag) return;
  state.drag = null;
  const at = position(event);
  if (drag.action !== "draw") {
    draw();
  } else if (mode() === "box" && drag.moved) {
    addRegion("box", atLeastAPixel(boxOf(drag.from, at)));
  } else {
    const found = regionAt(at, event);
    if (mode() === "point" && found?.kind !== "point") addRegion("point", at);
    else select(found?.id ?? null);
  }
  drawDraft();
  views.get(state.selected)?.shape.focus({ preventScroll: true, focusVisible: false }); // the keyboard goes on from here
}

function cancelDrag() {
  state.drag = null;
  drawDraft();
}

// ---------------------------------------------------------------- keyboard

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS_HINT = "Arrow keys move it, with Shift they size a box. Tab goes to the next, Delete removes, Enter asks.";

function keyDown(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    escape();
  } else if (!event.target.closest("textarea, input:not([type=radio], [type=checkbox]), select, dialog")) {
    plainKey(event);
  }
}

function escape() {
  if (state.drag) cancelDrag();
  else if (state.asking) state.asking.abort();
  else {
    document.activeElement?.closest(".shape")?.blur();
    select(null);
  }
}

function plainKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("token-dialog").open) return;
  const shape = event.target.closest(".shape");
  const pick = event.target.closest(".pick");
  const id = Number((shape ?? pick?.closest(".region"))?.dataset.region) || state.selected;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "b") setMode("box");
  else if (key === "p") setMode("point");
  else if (key === "n") addInTheMiddle();
  else if ((key === "Delete" || key === "Backspace") && id) removeRegion(id, Boolean(shape ?? pick));
  else if (key === "Enter" && (shape || event.target === document.body)) ask();
  else if (key === " " && shape) select(id);
  else if (key in ARROWS && shape) nudge(byId(id), ...ARROWS[key], event.shiftKey);
  else if (pick && (key === "ArrowDown" || key === "ArrowUp")) goAlongList(pick, key === "ArrowDown" ? 1 : -1);
  else return;
  event.preventDefault();
}

function goAlongList(pick, step) {
  const picks = [...$("regions").querySelectorAll(".pick")];
  picks[clamp(picks.indexOf(pick) + step, 0, picks.length - 1)].focus();
}

// ---------------------------------------------------------------- the question

function wordsGiven() {
  return [...new Set($("words").value.split(/[,;\n]/).map((word) => word.trim()).filter(Boolean))];
}

function showSource() {
  const own = $("source").value === "";
  $("words-field").hidden = !own;
  const count = wordsGiven().length;
  $("words-note").textContent = count === 0 ? "Separate them by commas or new lines."
    : count === 1 ? "1 word: every region will be that. Give it some company."
    : `${count} words`;
}

/** What is asked, or what is missing as text and where to go for it. */
function question() {
  const vocabulary = $("source").value;
  const words = wordsGiven();
  if (!state.file) return { missing: "Choose a picture first.", at: $("choose") };
  if (!state.regions.length) return { missing: "Draw a box or click a point first: what should be named?", at: $("add") };
  if (!vocabulary && !words.length) return { missing: "Write a few words to choose from.", at: $("words") };
  const asked = { top_k: TOP_K, masks: $("want-masks").checked };
  const [boxes, points] = ["box", "point"].map((kind) => state.regions.filter((region) => region.kind === kind));
  if (boxes.length) asked.boxes = boxes.map(({ at }) => at);
  if (points.length) asked.points = points.map(({ at }) => at);
  Object.assign(asked, vocabulary ? { vocabulary } : { words });
  return { asked, regions: [...boxes, ...points] }; // in the order of the answers
}

async function ask() {
  if (state.asking) return;
  const { asked, regions, missing, at } = question();
  showProblem(missing ?? "");
  if (missing) {
    at.focus();
    return;
  }
  const began = performance.now();
  const asking = new AbortController();
  setAsking(asking);
  try {
    const answer = await answerOf(asked, asking.signal);
    showAnswer(answer, regions, performance.now() - began);
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Cancelled.";
    else showProblem(explain(error));
  } finally {
    setAsking(null);
  }
}

/** The answer about the picture as the browser shows it: should the server see another size, it is sent what we see. */
async function answerOf(asked, signal) {
  const answer = await recognize(asked, signal);
  if (answer.image.width === state.width && answer.image.height === state.height) return answer;
  state.handle = null;
  state.file = await asPng($("photo"));
  return recognize(asked, signal);
}

function setAsking(controller) {
  state.asking = controller;
  $("ask").disabled = controller !== null;
  $("ask-text").textContent = controller ? "Asking…" : "Ask";
  $("cancel").hidden = controller === null;
  document.body.classList.toggle("is-busy", controller !== null);
  $("question").setAttribute("aria-busy", String(controller !== null));
}

function showAnswer(answer, regions, took) {
  state.handle = answer.image_handle;
  if ($("model").dataset.state !== "up") loadInfo();
  regions.forEach((region, index) => {
    const found = answer.regions[index];
    region.answer = found;
    region.mask = found.mask ? paintMask(found.mask, colourOf(region)) : null;
  });
  draw();
  const count = `${regions.length} region${regions.length === 1 ? "" : "s"}`;
  const known = answer.cached ? " The picture was known: encoders skipped." : "";
  $("status").textContent = `${count} in ${Math.round(took)} ms, ${Math.round(answer.took_ms)} ms of them at the server.${known}`;
}

// ---------------------------------------------------------------- wiring

function pictureFrom(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0] ?? null;
}

function listen() {
  const [stage, frame] = [$("stage"), $("frame")];
  stage.addEventListener("pointerdown", pointerDown);
  stage.addEventListener("pointermove", pointerMove);
  stage.addEventListener("pointerup", pointerUp);
  stage.addEventListener("pointercancel", cancelDrag);
  stage.addEventListener("pointerleave", () => state.drag ?? hover(null));
  stage.addEventListener("focusin", () => document.body.classList.contains("by-keys") && showHint(KEYS_HINT));
  stage.addEventListener("focusout", showMode);
  new ResizeObserver(draw).observe(stage);
  document.addEventListener("keydown", keyDown);
  document.addEventListener("keydown", () => document.body.classList.add("by-keys"), true);
  document.addEventListener("pointerdown", () => document.body.classList.remove("by-keys"), true);

  for (const id of ["choose", "change"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) usePicture(target.files[0], target.files[0].name);
    target.value = "";
  });
  $("sample").addEventListener("click", useSample);
  $("add").addEventListener("click", addInTheMiddle);
  $("clear").addEventListener("click", clearRegions);
  for (const input of document.querySelectorAll('input[name="mode"]')) input.addEventListener("change", showMode);

  document.addEventListener("paste", (event) => {
    const file = pictureFrom(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    usePicture(file, file.name);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.classList.add("is-target");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? frame.classList.remove("is-target"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("is-target");
    const file = pictureFrom(event.dataTransfer);
    if (file) usePicture(file, file.name);
  });

  $("source").addEventListener("change", showSource);
  $("words").addEventListener("input", showSource);
  $("question").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("cancel").addEventListener("click", () => state.asking?.abort());
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("token-dialog").close("given");
  });
  $("token-cancel").addEventListener("click", () => $("token-dialog").close());
}

listen();
showSource();
loadInfo();
