"use strict";
// What the page does in the browser beside gradio: alternatives of a word, heat maps, the camera, downloads, dark mode.

(() => {
  const find = (selector) => document.querySelector(selector);

  // Alternatives of a word

  const tip = document.createElement("div");
  tip.id = "alternatives";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;

  function cell(row, text) {
    row.insertCell().textContent = text;
  }

  function showAlternatives(word) {
    if (!tip.isConnected) document.body.append(tip);
    const table = document.createElement("table");
    for (const [token, probability, alternatives] of JSON.parse(word.dataset.tokens)) {
      for (const [other, p] of alternatives.length ? alternatives : [[token, probability]]) {
        const row = table.insertRow();
        cell(row, other === token ? "▸" : "");
        cell(row, visible(other));
        cell(row, `${(100 * p).toFixed(1)} %`);
      }
    }
    tip.replaceChildren(table);
    tip.hidden = false;
    word.setAttribute("aria-describedby", tip.id);
    const box = word.getBoundingClientRect(), height = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.bottom + height + 8 < innerHeight ? box.bottom + 4 : Math.max(4, box.top - height - 4)}px`;
  }

  function visible(token) {
    return token.replaceAll("\n", "↵").replaceAll(" ", "␣") || "(end)";
  }

  const hideAlternatives = () => (tip.hidden = true);
  const wordAt = (event) => event.target.closest?.(".words .word");
  document.addEventListener("mouseover", (event) => (wordAt(event) ? showAlternatives(wordAt(event)) : hideAlternatives()));
  document.addEventListener("focusin", (event) => wordAt(event) && showAlternatives(wordAt(event)));
  document.addEventListener("focusout", hideAlternatives);
  document.addEventListener("scroll", hideAlternatives, true);

  // The arrow keys move between words, so that Tab leaves them after one press

  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideAlternatives();
    const word = wordAt(event), step = STEPS[event.key];
    if (!word || !step) return;
    event.preventDefault();
    const all = [...word.closest(".words").querySelectorAll(".word")];
    const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(word) + step))];
    word.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  // What an answer looks at

  let view = null, explained = null; // the viewer, and the answer that it shows

  function look(answer, word) {
    if (explained === answer && find("#look .viewer") && word !== null) {
      view.show(word);
      return;
    }
    const wanted = find("#wanted textarea, #wanted input");
    wanted.value = `${answer}:${word ?? 0}`;
    wanted.dispatchEvent(new Event("input", { bubbles: true }));
    setTimeout(() => (find("#explain button") ?? find("#explain")).click(), 50); // after gradio has read the value
  }

  document.addEventListener("click", (event) => {
    const word = wordAt(event), button = event.target.closest?.("#answers .look");
    if (word?.closest("#answers")) look(word.closest(".words").dataset.answer, Number(word.dataset.word));
    if (button) look(button.dataset.answer, null);
    const copy = event.target.closest?.("#answers .copy");
    if (copy) copyText(copy, copy.closest(".bot, .message").querySelector(".words").textContent.trim());
  });

  function showLook(data) {
    const root = document.createElement("section"), parsed = JSON.parse(data.textContent);
    root.setAttribute("aria-label", "What the answer looked at");
    data.replaceWith(root);
    view = showExplanation(root, parsed);
    explained = parsed.answer;
    view.ready.then(() => view.show(parsed.word));
    root.scrollIntoView({ block: "nearest" });
  }

  async function copyText(button, text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch (error) {
      say(`It cannot be copied: ${error.message ?? "this page needs https"}`);
      return;
    }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 2000);
  }

  function conversation() {
    const parts = [...document.querySelectorAll("#answers .user .md, #answers .user img, #answers .bot .words")];
    return parts.map((one) => {
      if (one.matches("img")) return "User: [picture]";
      return `${one.matches(".words") ? "Assistant" : "User"}: ${one.textContent.trim()}`;
    }).join("\n\n");
  }

  // Downloads

  function save(data) {
    const link = document.createElement("a");
    const type = { csv: "text/csv", json: "application/json" }[data.dataset.kind];
    link.href = URL.createObjectURL(new Blob([data.textContent], { type: `${type};charset=utf-8` }));
    const time = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
    link.download = `${data.dataset.name}-${time}.${data.dataset.kind}`;
    link.click();
    URL.revokeObjectURL(link.href);
    data.remove();
  }

  // Questions

  // The server escapes what would be HTML in a question; whoever edits it sees what was written.
  function unescapeOnce(field) {
    field.dataset.isText = "yes";
    const text = field.value.replace(/&lt;/g, "<").replace(/&amp;/g, "&");
    if (text === field.value) return;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // Gradio has no text for pictures that are sent.
  function name(image, n) {
    image.alt = `Picture ${n + 1} of the conversation`;
  }

  new MutationObserver(() => {
    document.querySelectorAll("#answers img").forEach((image, n) => image.alt || name(image, n));
    document.querySelectorAll("#answers textarea:not([data-is-text])").forEach(unescapeOnce);
    // gradio's pictures beside a question are items of what is no list
    document.querySelectorAll(".thumbnail-wrapper[role=listitem]").forEach((one) => one.removeAttribute("role"));
    const data = find("#look .look-data"), record = find(".record-data");
    if (data) showLook(data);
    if (record) save(record);
  }).observe(document, { childList: true, subtree: true });

  // The camera

  async function photograph() {
    const dialog = document.createElement("dialog"), video = document.createElement("video");
    dialog.id = "camera";
    dialog.setAttribute("aria-label", "Photograph");
    video.playsInline = true;
    const shoot = button("Take the photo"), cancel = button("Cancel");
    shoot.disabled = true; // until there is a picture to take
    dialog.append(video, shoot, cancel);
    document.body.append(dialog);
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: true });
    } catch (error) {
      dialog.remove();
      say(`The camera cannot be used: ${error.message ?? "this page needs https"}`);
      return;
    }
    video.srcObject = stream;
    dialog.addEventListener("close", () => {
      stream.getTracks().forEach((track) => track.stop());
      dialog.remove();
    });
    cancel.addEventListener("click", () => dialog.close());
    shoot.addEventListener("click", async () => {
      attach(await shot(video));
      dialog.close();
    });
    dialog.showModal();
    video.addEventListener("playing", () => (shoot.disabled = false));
    await video.play().catch(() => {}); // closed before it played
  }

  function button(text) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    return made;
  }

  async function shot(video) {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
    return new File([blob], "photo.jpg", { type: "image/jpeg" });
  }

  // As if the file had been chosen with the button of the question.
  function attach(file) {
    const input = find("#question input[type=file]"), files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  // Beside #problem, whose contents gradio owns: it would no longer show what the server says.
  function say(text) {
    const line = document.createElement("p");
    line.setAttribute("role", "alert");
    line.textContent = text;
    find("#problem").after(line);
    setTimeout(() => line.remove(), 10_000);
  }

  // Dark mode

  const remembered = localStorage.getItem("llava-dark");
  function setDark(on) {
    document.body.classList.toggle("dark", on);
    localStorage.setItem("llava-dark", on ? "1" : "0");
  }
  if (remembered !== null) setDark(remembered === "1"); // gradio has set what the system asks for before

  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#photograph")) photograph();
    if (event.target.closest?.("#copy")) copyText(event.target.closest("#copy"), conversation());
    if (event.target.closest?.("#dark")) setDark(!document.body.classList.contains("dark"));
  });
})();
