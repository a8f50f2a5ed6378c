// The page: tabs, the model's facts, and the two things to do with a flow.

import { Refusal, ask, openWithToken } from "./server.js";
import { startDrawing } from "./draw.js";
import { startLikelihood } from "./likelihood.js";
import { showRefusal } from "./words.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const to = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : i + (KEYS[event.key] ?? 0);
    if (to === i) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    choose(next);
    next.focus();
  });
}

for (const form of document.querySelectorAll("main form")) {
  form.addEventListener("submit", (event) => event.preventDefault()); // even while the server is not there
}

for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", openWithToken);

/** What the model is, told once; asked for again with the Draw button if the server was not there. */
async function begin() {
  const error = document.getElementById("draw-error");
  const go = document.getElementById("go");
  go.disabled = true;
  try {
    const model = await (await ask("v1/model")).json();
    error.hidden = true;
    describe(model);
    const score = startLikelihood(model);
    startDrawing(model, (image, name) => {
      choose(tabs[1]);
      tabs[1].focus();
      score(image, name);
    });
  } catch (refused) {
    if (!(refused instanceof Refusal)) throw refused;
    showRefusal(error, refused);
    go.addEventListener("click", begin, { once: true });
  } finally {
    go.disabled = false;
  }
}

function describe(model) {
  const facts = [
    model.name,
    `${model.size}\u2009×\u2009${model.size}${model.channels === 1 ? "" : `, ${model.channels} channels`}`,
    `${model.blocks} blocks`,
    model.classes ? `${model.classes} classes` : "unconditional",
    model.precision,
    model.backend.split(";")[0], // the rest says why not another
  ];
  document.getElementById("model").replaceChildren(...facts.map((fact) => {
    const item = document.createElement("span");
    item.textContent = fact;
    return item;
  }));
  document.title = `${model.name} · tarflow`;
}

begin();
