// Likelihood: an image comes in by drop, choice, paste or from the board; bits/dim and class probabilities come out.

import { Refusal, ask } from "./server.js";
import { className, clearRefusal, showRefusal } from "./words.js";

const SHOWN = 10; // classes, the most probable first
const at = (id) => document.getElementById(id);

/** Returns score(blob, name), which asks for the likelihood of an image and shows it. */
export function startLikelihood(model) {
  at("wants").textContent = `PNG or JPEG; cropped and resized if it is not ${model.size}\u2009×\u2009${model.size}`;
  const score = (blob, name) => scoreImage(model, blob, name);
  const take = (files) => files.length && score(files[0], files[0].name);
  at("file").addEventListener("change", () => {
    take(at("file").files);
    at("file").value = ""; // the same file may be chosen again
  });
  const panel = at("panel-likelihood");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    panel.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files);
    });
  }
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault()); // a miss
  document.addEventListener("paste", (event) => panel.hidden || take(event.clipboardData.files));
  return score;
}

let latest = null;

async function scoreImage(model, blob, name) {
  latest?.abort();
  const mine = (latest = new AbortController());
  clearRefusal(at("likelihood-error"));
  at("likelihood-stage").setAttribute("aria-busy", "true");
  at("likelihood-status").textContent = `Scoring ${name}…`;
  try {
    if (blob.size > model.largest_bytes)
      throw new Refusal(`${name} is larger than the ${model.largest_bytes >> 20} MiB that this server takes; send a smaller one.`);
    const options = { method: "POST", body: blob, headers: { "Content-Type": blob.type || "application/octet-stream" }, signal: mine.signal };
    show(model, await (await ask("v1/likelihood", options)).json(), name);
  } catch (stopped) {
    if (stopped.name === "AbortError") return;
    if (!(stopped instanceof Refusal)) throw stopped;
    at("likelihood-status").textContent = `${name} was not scored.`;
    at("scored").hidden = true;
    showRefusal(at("likelihood-error"), stopped);
  } finally {
    if (latest === mine) at("likelihood-stage").setAttribute("aria-busy", "false");
  }
}

function show(model, result, name) {
  at("scored").hidden = false;
  at("seen").src = `data:image/png;base64,${result.picture}`;
  at("seen").classList.toggle("crisp", result.size <= 32);
  at("bits").textContent = result.bits_per_dim.toFixed(3);
  at("bits-note").textContent = `mean of ${result.draws} draws of the training noise, which differ by ±${result.bits_spread.toFixed(3)}`;
  at("notes").replaceChildren(...result.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
  at("posterior").hidden = !result.probabilities;
  let told = `${name}: ${result.bits_per_dim.toFixed(3)} bits/dim`;
  if (result.probabilities) told += `, ${rank(model, result)}`;
  at("likelihood-status").textContent = `${told}.`;
}

/** The bars, and the verdict in words. */
function rank(model, { probabilities, log_likelihoods }) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const best = order[0];
  at("verdict").textContent = `${className(model, best)}, with ${percent(probabilities[best])}`;
  const shown = order.slice(0, SHOWN).sort((a, b) => (probabilities.length <= SHOWN ? a - b : 0));
  at("bars").classList.toggle("named", Boolean(model.class_names));
  at("bars").replaceChildren(...shown.map((label) => {
    const item = document.createElement("li");
    item.className = label === best ? "best" : "";
    const [name, track, bar, share, nats] = ["b", "span", "i", "span", "span"].map((kind) => document.createElement(kind));
    bar.style.width = `${100 * probabilities[label]}%`;
    track.className = "track";
    track.append(bar);
    name.textContent = name.title = className(model, label);
    share.className = "number share";
    share.textContent = percent(probabilities[label]);
    nats.className = "number";
    nats.textContent = `${log_likelihoods[label].toFixed(1).replace("-", "−")} nats`;
    item.append(name, track, share, nats);
    return item;
  }));
  return `most probably class ${className(model, best)}, with ${percent(probabilities[best])}`;
}

function percent(part) {
  if (part > 0.999 && part < 1) return "> 99.9 %";
  if (part < 0.001 && part > 0) return "< 0.1 %";
  return `${(100 * part).toFixed(1)} %`;
}
