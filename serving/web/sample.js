// A few toys on a grey ground, with boxes around them and words to choose from.

import { $ } from "./dom.js";
import { openImage } from "./image.js";
import { addRegion, select } from "./regions.js";
import { showSource } from "./vocabulary.js";

const [WIDTH, HEIGHT] = [384, 256];
const BOXES = [[46, 46, 138, 138], [226, 40, 318, 132], [136, 150, 244, 236]];
const WORDS = "plain green toy, plain yellow toy, plain blue toy, red toy with blue stripes, red toy with white dots";

export async function openSample() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [WIDTH, HEIGHT];
  paintToys(canvas.getContext("2d"));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!(await openImage(blob, "sample.png"))) return;
  for (const box of BOXES) addRegion("box", box);
  if (!$("words").value.trim()) {
    $("words").value = WORDS;
    showSource();
  }
  select(null);
  $("ask").focus();
}

function paintToys(paint) {
  paint.fillStyle = "#8d8a86";
  paint.fillRect(0, 0, WIDTH, HEIGHT);
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
}

function drawToy(paint, base, stripes, outline) {
  paint.save();
  paint.beginPath();
  outline();
  paint.clip();
  paint.fillStyle = base;
  paint.fillRect(0, 0, WIDTH, HEIGHT);
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
