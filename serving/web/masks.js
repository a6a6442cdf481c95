// From a mask as COCO run-length encoding to the path around it. Nothing of an image's size is kept.

const CUT = 0.45; // of a cell's side, at each corner of an outline

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

/** The box around a mask, xyxy in whole pixels; null for an empty mask. Runs go down its columns. */
function boundsOfRuns(runs, height) {
  const bounds = [Infinity, Infinity, -Infinity, -Infinity];
  let start = 0;
  runs.forEach((length, index) => {
    const last = start + length - 1;
    if (index % 2 && length) {
      const columns = [Math.floor(start / height), Math.floor(last / height)];
      const isLong = columns[0] !== columns[1];
      bounds[0] = Math.min(bounds[0], columns[0]);
      bounds[1] = Math.min(bounds[1], isLong ? 0 : start % height);
      bounds[2] = Math.max(bounds[2], columns[1] + 1);
      bounds[3] = Math.max(bounds[3], isLong ? height : last % height + 1);
    }
    start += length;
  });
  return bounds[2] > 0 ? bounds : null;
}

/** The part of a mask within bounds as a grid of 0 and 1, row by row, with a border of 0s around it. */
function sampleMask(runs, height, [x0, y0, x1, y1], rows, columns) {
  const stride = columns + 2;
  const inside = new Uint8Array(stride * (rows + 2));
  let run = 0;
  let end = runs[0] ?? 0;
  for (let column = 0; column < columns; column += 1) {
    const first = (x0 + Math.floor((column + 0.5) / columns * (x1 - x0))) * height + y0;
    for (let row = 0; row < rows; row += 1) {
      const at = first + Math.floor((row + 0.5) / rows * (y1 - y0));
      while (end <= at && run < runs.length - 1) {
        run += 1;
        end += runs[run];
      }
      inside[(row + 1) * stride + column + 1] = run % 2 && at < end;
    }
  }
  return inside;
}

/** Closed loops along the edges of a grid's cells, each a list of the corners x, y, x, y, ...; cells of 1 lie on the right. */
function trace(inside, stride) {
  const steps = [1, stride, -1, -stride]; // east, south, west, north from a corner, which has its cell's index
  const aheadLeft = [-stride, 0, -1, -stride - 1];
  const aheadRight = [0, -1, -stride - 1, -stride];
  const seen = new Uint8Array(inside.length); // edges above cells
  const loops = [];
  for (let start = stride; start < inside.length; start += 1) {
    if (!inside[start] || inside[start - stride] || seen[start]) continue;
    const loop = [];
    let corner = start;
    let heading = 0;
    do {
      if (heading === 0) seen[corner] = 1;
      corner += steps[heading];
      const turn = inside[corner + aheadLeft[heading]] ? 3 : inside[corner + aheadRight[heading]] ? 0 : 1;
      if (turn) loop.push(corner % stride - 1, Math.floor(corner / stride) - 1);
      heading = (heading + turn) % 4;
    } while (corner !== start || heading !== 0);
    loops.push(loop);
  }
  return loops;
}

/**
 * The outline of a mask in pixels of its image, {path, bounds}; null for an empty mask. Its grid is the image's own where
 * the mask's longer side has at most `maxSide` pixels, and that fine otherwise.
 */
export function outlineOf({ size: [height], counts }, maxSide = 1024) {
  const runs = runsOf(counts);
  const bounds = boundsOfRuns(runs, height);
  if (!bounds) return null;
  const [x0, y0, x1, y1] = bounds;
  const factor = Math.min(1, maxSide / Math.max(x1 - x0, y1 - y0));
  const [rows, columns] = [y1 - y0, x1 - x0].map((side) => Math.max(1, Math.round(side * factor)));
  const [across, down] = [(x1 - x0) / columns, (y1 - y0) / rows];
  const path = new Path2D();
  for (const loop of trace(sampleMask(runs, height, bounds, rows, columns), columns + 2)) {
    bevel(loop).forEach(([x, y], index) => {
      if (index) path.lineTo(x0 + x * across, y0 + y * down);
      else path.moveTo(x0 + x * across, y0 + y * down);
    });
    path.closePath();
  }
  return { path, bounds };
}

/** The corners of a loop cut off, so that slanted edges are no stairs. Every cell keeps more than half of its area, or less of it. */
function bevel(loop) {
  const corners = [];
  for (let at = 0; at < loop.length; at += 2) corners.push([loop[at], loop[at + 1]]);
  return corners.flatMap(([x, y], index) => [corners.at(index - 1), corners[(index + 1) % corners.length]].map((other) => (
    [x + CUT * Math.sign(other[0] - x), y + CUT * Math.sign(other[1] - y)]
  )));
}

const EDGE = { dark: 4.5, light: 2 }; // screen pixels: a dark line shows on light things, a light one within it on dark things

/** Strokes an outline on a canvas whose unit is `unit` screen pixels' worth of the image. */
export function strokeOutline(paint, { path }, colour, unit) {
  paint.lineJoin = "round";
  for (const [width, style] of [[EDGE.dark, "rgb(12 14 16 / 70%)"], [EDGE.light, colour]]) {
    paint.lineWidth = width * unit;
    paint.strokeStyle = style;
    paint.stroke(path);
  }
}
