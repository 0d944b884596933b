"use strict";
// Everything from the run is shown with textContent, so that it stays text.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
let shown = []; // questions of the task that pass the filters
let position = 0;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fill(select, names) {
  const options = [["", "all"], ...names.map((name) => [name, name])];
  select.replaceChildren(...options.map(([value, text]) => Object.assign(element("option", text), { value })));
}

const task = () => data.tasks[at("task").value];

function openTask() {
  const { name, metric, score, questions } = task();
  at("score").textContent = `${name}: ${score}, ${metric}`;
  fill(at("verdict"), [...new Set(questions.map((one) => one.verdict))]);
  fill(at("group"), [...new Set(questions.flatMap((one) => one.groups))]);
  filter();
}

function passes(one) {
  const { verdict, group, text } = { verdict: at("verdict").value, group: at("group").value, text: at("text").value.toLowerCase() };
  return (!verdict || one.verdict === verdict) && (!group || one.groups.includes(group))
    && [one.id, one.prompt, one.text ?? "", one.answer].some((part) => part.toLowerCase().includes(text));
}

function filter() {
  shown = task().questions.filter(passes);
  position = 0;
  show();
}

function step(by) {
  position = Math.min(Math.max(position + by, 0), shown.length - 1);
  show();
}

function picture(one) {
  if (typeof one === "string") return element("p", one, "missing");
  const image = element("img");
  image.src = data.pictures[one];
  image.alt = "picture of this question";
  return image;
}

function show() {
  at("position").textContent = shown.length ? `${position + 1} of ${shown.length}` : "no question";
  at("previous").disabled = position <= 0;
  at("next").disabled = position >= shown.length - 1;
  at("question").replaceChildren(...(shown.length ? card(shown[position]) : []));
}

function card(one) {
  const pictures = element("div", undefined, "pictures");
  pictures.append(...one.images.map(picture));
  const list = element("dl");
  const verdict = one.score === null ? one.verdict : `${one.verdict} (${one.score})`;
  const facts = [
    ["Question", one.id], ["Prompt", one.prompt], ["Answer", one.text ?? "–"], ["Right answer", one.answer || "–"],
    ["Verdict", verdict, one.verdict.split(" ")[0]], ["Groups", one.groups.join(", ") || "–"],
    ...one.reviews.map((review) => ["Review", review]),
  ];
  for (const [name, value, className] of facts) list.append(element("dt", name), element("dd", value, className));
  return [pictures, list];
}

at("title").textContent = `Answers of ${data.name}`;
document.title = at("title").textContent;
at("task").replaceChildren(...data.tasks.map(({ name }, i) => Object.assign(element("option", name), { value: i })));
at("task").addEventListener("change", openTask);
for (const id of ["verdict", "group"]) at(id).addEventListener("change", filter);
at("text").addEventListener("input", filter);
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("previous").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1 }[event.key];
  if (by) step(by);
});
openTask();
