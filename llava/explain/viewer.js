"use strict";
// The words of a reply, and what each looks at in the pictures: used by the file of `llava explain` and by the chat page.

const COLOURS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function colour(strength) {
  const at = strength * (COLOURS.length - 1), low = Math.min(Math.floor(at), COLOURS.length - 2), part = at - low;
  const rgb = COLOURS[low].map((value, i) => Math.round((1 - part) * value + part * COLOURS[low + 1][i]));
  return `rgba(${rgb}, ${0.75 * Math.sqrt(strength)})`;
}

function edges(boxes, side) {
  return [...new Set(boxes.flatMap((box) => [box[side], box[side + 2]]))].sort((a, b) => a - b);
}

// Boxes can overlap, as in tiles over a whole picture: their densities add up in cells between all their edges.
function densities(shares, boxes, xs, ys) {
  const cells = ys.map(() => new Float64Array(xs.length));
  boxes.forEach(([left, top, right, bottom], i) => {
    const density = shares[i] / ((right - left) * (bottom - top));
    for (let y = ys.indexOf(top); ys[y] < bottom; y++)
      for (let x = xs.indexOf(left); xs[x] < right; x++) cells[y][x] += density;
  });
  return cells;
}

function paint({ image, canvas, caption, picture }, shares) {
  canvas.width = image.clientWidth;
  canvas.height = image.clientHeight;
  const xs = edges(picture.boxes, 0), ys = edges(picture.boxes, 1), cells = densities(shares, picture.boxes, xs, ys);
  const highest = Math.max(...cells.map((row) => Math.max(...row)), 1e-12);
  const context = canvas.getContext("2d"), sx = canvas.width / picture.width, sy = canvas.height / picture.height;
  for (let y = 0; y + 1 < ys.length; y++)
    for (let x = 0; x + 1 < xs.length; x++) {
      context.fillStyle = colour(cells[y][x] / highest);
      const left = Math.round(xs[x] * sx), top = Math.round(ys[y] * sy);
      context.fillRect(left, top, Math.round(xs[x + 1] * sx) - left, Math.round(ys[y + 1] * sy) - top);
    }
  const total = shares.reduce((sum, share) => sum + share, 0);
  caption.textContent = `${(100 * total).toFixed(1)} % of the attention goes to this picture`;
}

function element(parent, tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

function figureOf(parent, picture, number) {
  const figure = element(parent, "figure"), image = element(figure, "img", { alt: `Picture ${number + 1}` });
  const canvas = element(figure, "canvas", { "aria-hidden": "true" }), caption = element(figure, "figcaption");
  image.src = picture.source;
  image.style.imageOrientation = "none"; // boxes are in pixels of the file
  return { image, canvas, caption, picture };
}

// Fills `root`. Returns `show(i)`, which paints word i, and `ready`, a promise that the pictures are there.
function showExplanation(root, data) {
  root.classList.add("viewer");
  root.replaceChildren();
  element(root, "p", { class: "question" }, data.question);
  const words = element(root, "div", { class: "words", role: "group", "aria-label": "Words of the answer" });
  const pictures = element(root, "div", { class: "pictures" });
  element(root, "p", { class: "note" }, "Choose a word, with the mouse or with Tab. The lighter a part of the picture, "
    + "the more attention it gets when the word is predicted.");
  const fold = element(root, "details");
  element(fold, "summary", {}, "The prompt as the model saw it");
  element(fold, "pre", { class: "prompt" }, data.prompt);
  const figures = data.pictures.map((picture, number) => figureOf(pictures, picture, number));
  let shown = -1;

  function show(i) {
    if (!buttons[i]) return;
    buttons[shown]?.setAttribute("aria-pressed", "false");
    buttons[i].setAttribute("aria-pressed", "true");
    shown = i;
    figures.forEach((figure, n) => paint(figure, data.words[i].shares[n]));
  }

  const buttons = data.words.map((word, i) => {
    const button = element(words, "button", { type: "button", "aria-pressed": "false" }, word.text);
    for (const event of ["click", "focus", "mouseenter"]) button.addEventListener(event, () => show(i));
    words.append(" ");
    return button;
  });
  window.addEventListener("resize", () => root.isConnected && show(shown));
  const ready = Promise.allSettled(figures.map(({ image }) => image.decode()));
  return { show, ready };
}
