// Drawing: the form, the stream of blocks, and the board they appear on.

import { Refusal, events } from "./server.js";
import { Board } from "./board.js";
import { className, clearRefusal, showRefusal } from "./words.js";

const FEW_CLASSES = 20; // as many chips as a glance takes in
const PRESETS = [1, 8, 16, 64];
const at = (id) => document.getElementById(id);

/** Make the form fit the model. `score(blob, name)` is called with an image whose likelihood is wanted. */
export function startDrawing(model, score) {
  const board = new Board(model, score);
  fillForm(model);
  let running = null;

  at("draw").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    clearRefusal(at("draw-error"));
    const problem = wrong(model);
    if (problem) return showRefusal(at("draw-error"), problem);
    const query = asked(model);
    history.replaceState(null, "", `?${remembered(model)}`);
    running = new AbortController();
    busy(true);
    await draw(query, board, running.signal);
    running = null;
    busy(false);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
}

async function draw(query, board, signal) {
  at("draw-status").textContent = "Waiting for the model…";
  let finished = false;
  try {
    for await (const { name, data } of events(`v1/samples/stream?${query}`, signal)) {
      if (name === "start") await board.start(data);
      else if (name === "block") await board.block(data);
      else if (name === "error") throw new Refusal(data.message);
      else if (name === "done") {
        await board.done(data);
        finished = true;
      }
      if (name === "start" || name === "block") progress(data);
    }
    if (!finished) throw new Refusal("The server closed the connection before the images were done. Draw again.");
  } catch (stopped) {
    if (stopped.name === "AbortError") at("draw-status").textContent = "Stopped.";
    else if (stopped instanceof Refusal) {
      at("draw-status").textContent = "Nothing more was drawn.";
      showRefusal(at("draw-error"), stopped);
    } else throw stopped;
  }
}

function progress({ done = 0, of, block }) {
  at("progress").max = of;
  at("progress").value = done;
  at("draw-status").textContent = block === undefined ? "Noise. Now the blocks, last to first…" : `Block ${block} inverted…`;
}

function busy(is) {
  at("stage").setAttribute("aria-busy", is);
  at("go").textContent = is ? "Stop" : "Draw";
  at("go").classList.toggle("stop", is);
  at("progress").hidden = !is;
  if (is) at("progress").removeAttribute("value");
}

// --- the form ------------------------------------------------------------------------------------------------------

function fillForm(model) {
  const given = new URLSearchParams(location.search);
  const several = model.classes > FEW_CLASSES;
  if (model.classes) {
    const numbers = several ? ["one"] : Array.from({ length: model.classes }, (_, k) => String(k));
    at("chips").replaceChildren(...["each", ...numbers, "none"].map((value) => chip(model, value)));
    const chosen = given.get("class") ?? "each";
    const single = several && /^\d+$/.test(chosen);
    const choices = [...at("chips").querySelectorAll("input")];
    (choices.find((choice) => choice.value === (single ? "one" : chosen)) ?? choices[0]).checked = true;
    at("class-number").max = model.classes - 1;
    if (single) at("class-number").value = chosen;
    at("chips").addEventListener("change", () => follow());
    if (model.class_names) {
      const tell = () => (at("class-name").textContent = className(model, at("class-number").value));
      at("class-number").addEventListener("input", tell);
      tell();
    }
    at("classes").hidden = false;
    follow();
  } else {
    at("guidance").value = 0;
    at("guidance-note").textContent = "0 is none; without classes, 0.1 to 1 is usual.";
    at("temperature-field").hidden = false;
  }
  at("guidance-field").hidden = false;
  at("n").max = model.largest_n;
  for (const name of ["seed", "n", "guidance", "temperature"]) if (given.has(name)) at(name).value = given.get(name);
  at("guidance-slide").value = at("guidance").value;
  at("guidance-slide").addEventListener("input", () => (at("guidance").value = at("guidance-slide").value));
  at("guidance").addEventListener("input", () => (at("guidance-slide").value = at("guidance").value));
  at("next-seed").addEventListener("click", () => (at("seed").value = Math.floor(Math.random() * 1e6)));
  at("presets").replaceChildren(...PRESETS.filter((n) => n <= model.largest_n).map((n) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = n;
    button.addEventListener("click", () => (at("n").value = n));
    return button;
  }));
}

function chip(model, value) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "class", value });
  const words = { each: "each in turn", none: "no class", one: "one class" };
  const text = document.createElement("span");
  text.textContent = words[value] ?? className(model, value);
  label.append(input, text);
  return label;
}

const chosenClass = () => at("chips").querySelector("input:checked")?.value ?? "none";

/** Guidance pulls towards a class: without one there is nothing to pull towards. */
function follow() {
  const none = chosenClass() === "none";
  at("guidance").disabled = at("guidance-slide").disabled = none;
  at("guidance-note").textContent = none ? "Guidance needs a class." : "0 is none; 1 to 3 is usual.";
  at("class-field").hidden = chosenClass() !== "one";
}

function wrong(model) {
  const fields = [["seed", "Seed"], ["n", "Images"]];
  if (!at("guidance").disabled) fields.push(["guidance", "Guidance"]);
  if (!model.classes) fields.push(["temperature", "Attention temperature"]);
  if (chosenClass() === "one") fields.push(["class-number", "Class"]);
  let first;
  for (const [id, name] of fields) {
    const field = at(id);
    const bad = !field.checkValidity();
    field.setAttribute("aria-invalid", bad);
    if (bad) first ??= [field, name];
  }
  if (!first) return null;
  const [field, name] = first;
  field.focus();
  const kind = field.step === "1" ? "a whole number" : "a number";
  const most = Number(field.max) >= Number.MAX_SAFE_INTEGER ? "2⁵³ − 1" : field.max;
  return new Refusal(`${name} must be ${kind} from ${field.min} to ${most}.`);
}

function asked(model) {
  const query = new URLSearchParams({ n: at("n").value, seed: at("seed").value });
  if (!model.classes && Number(at("guidance").value)) {
    query.set("guidance", at("guidance").value);
    query.set("attention_temperature", at("temperature").value);
  }
  if (!model.classes || chosenClass() === "none") return query;
  const each = Array.from({ length: Math.min(model.classes, Number(at("n").value)) }, (_, k) => k);
  query.set("labels", { each: each.join(","), one: at("class-number").value }[chosenClass()] ?? chosenClass());
  query.set("guidance", at("guidance").value);
  return query;
}

/** The form's state in the page's address, so that a drawing can be shared. */
function remembered(model) {
  const query = new URLSearchParams({ seed: at("seed").value, n: at("n").value });
  if (model.classes) query.set("class", chosenClass() === "one" ? at("class-number").value : chosenClass());
  else query.set("temperature", at("temperature").value);
  query.set("guidance", at("guidance").value);
  return query;
}
