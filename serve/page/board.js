// The board: every image after every block, the scrubber over blocks, and the one image that is chosen.
//
// A state is the images after one block: states[0] is the noise, the last what was asked for. A sheet is a canvas with
// all images of one state, `columns` a row. reached[i] is the last state that image i has come to.

import { Certificates } from "./certificates.js";
import { ask, openWithToken } from "./server.js";
import { className, duration, error, summary } from "./words.js";

const FILM = 8; // so many images have their states below one another; more are one large grid
const at = (id) => document.getElementById(id);

export class Board {
  constructor(model, score) {
    this.model = model;
    this.size = model.size;
    this.certificates = new Certificates(at("certificates"), model.certificate_limit);
    at("board").addEventListener("click", (event) => {
      const place = event.target.closest("[data-image]");
      if (place) this.choose(Number(place.dataset.image));
    });
    at("board").addEventListener("keydown", (event) => this.#walk(event));
    at("scrubber").addEventListener("change", (event) => this.show(Number(event.target.value)));
    at("sample-score").addEventListener("click", () => this.#picture(this.last).toBlob((blob) => score(blob, this.#name())));
    at("sample-copy").addEventListener("click", () => this.#copy());
    at("sample-link").addEventListener("click", openWithToken);
  }

  /** Noise has come: make room for every state. */
  async start({ n, seed, first_sample, labels, states, columns, picture }) {
    Object.assign(this, { n, seed, labels, states, columns, first: first_sample });
    this.last = states.length - 1;
    this.chosen = 0;
    this.finished = null;
    this.reached = new Array(n).fill(0);
    this.seconds = new Array(states.length).fill(0);
    this.sheets = states.map(() => this.#canvas(columns, Math.ceil(n / columns)));
    this.shown = this.last;
    this.film = n <= FILM;
    this.#layOut();
    at("drawing").hidden = false;
    at("sample").hidden = true;
    await this.#put(0, 0, n, columns, picture);
  }

  /** Some images have come through a block. */
  async block({ block, first, count, columns, seconds, picture }) {
    const state = this.states.indexOf(`block ${block}`);
    this.seconds[state] += seconds;
    await this.#put(state, first - this.first, count, columns, picture);
  }

  async done(data) {
    this.finished = data;
    this.certificates.judgeBy(data.suspect_above);
    if (this.states.at(-1) === "denoised") this.seconds[this.last] = data.denoise_seconds;
    await this.#put(this.last, 0, this.n, this.columns, data.picture);
    this.#times();
    for (const [i, cell] of this.cells.entries()) {
      cell.classList.toggle("broken", data.nonfinite.includes(this.first + i));
      if (this.film) this.errors[i].textContent = error(data.certificate[i]);
      if (this.film) this.errors[i].classList.toggle("suspect", this.certificates.isSuspect(data.certificate[i]));
      cell.setAttribute("aria-label", this.#name(i) + `, round-trip error ${error(data.certificate[i])}`);
    }
    at("draw-status").textContent = summary(data);
    this.choose(this.chosen);
  }

  /** Show the images as they were after a state, or as far as they have come. */
  show(state) {
    this.shown = state;
    for (let i = 0; i < this.n; i++) this.#paint(i);
  }

  /** Choose an image: its states are on the scrubber at once, the rest is told when the drawing is done. */
  choose(image) {
    this.cells[this.chosen].tabIndex = -1;
    this.cells[this.chosen].removeAttribute("aria-current");
    this.chosen = image;
    this.cells[image].tabIndex = 0;
    this.cells[image].setAttribute("aria-current", "true");
    for (let state = 0; state <= this.last; state++) this.#stopPicture(state);
    if (this.finished) this.#tell(image);
  }

  #tell(image) {
    at("sample").hidden = false;
    at("sample-name").textContent = this.#name();
    at("sample-picture").setAttribute("aria-label", this.#name());
    this.#copyTo(at("sample-picture"), this.last, image);
    at("sample-link").href = this.finished.links[image];
    at("sample-copy").textContent = "Copy link";
    at("sample-save").href = this.#enlarged(image).toDataURL("image/png");
    at("sample-save").download = `${this.seed}-${this.first + image}.png`;
    const facts = [["Seed", this.seed], ["Round-trip error", error(this.finished.certificate[image])]];
    at("sample-facts").replaceChildren(...facts.flatMap(([term, value]) => [element("dt", term), element("dd", value)]));
    this.certificates.show(this.finished.certificate, image, (picked) => this.choose(picked));
  }

  // --- places -------------------------------------------------------------------------------------------------------

  #layOut() {
    const board = at("board");
    this.cells = Array.from({ length: this.n }, (_, i) => {
      const cell = element("button");
      Object.assign(cell, { type: "button", className: "cell", tabIndex: i ? -1 : 0 });
      cell.dataset.image = i;
      cell.setAttribute("aria-label", this.#name(i));
      cell.append(this.#canvas());
      return cell;
    });
    board.className = this.film ? "film" : "grid";
    board.style.setProperty("--columns", this.film ? this.n : this.columns);
    board.classList.toggle("crisp", this.size <= 32);
    board.replaceChildren(...(this.film ? this.#rows() : this.cells));
    at("scrubber").hidden = this.film;
    this.stops = this.film ? [] : this.states.map((name, state) => this.#stop(name, state));
    at("scrubber").replaceChildren(at("scrubber").querySelector("legend"), ...this.stops);
    this.#times();
  }

  /** Film: a row a state, its name before it; the last one holds the cells. */
  #rows() {
    this.frames = this.states.map((_, state) =>
      state === this.last ? this.cells.map((cell) => cell.firstChild) : this.cells.map((_, i) => {
        const frame = this.#canvas();
        frame.dataset.image = i;
        return frame;
      }));
    return this.states.flatMap((name, state) => {
      const title = element("span", name);
      title.className = "row";
      title.append(time());
      return [title, ...(state === this.last ? this.cells : this.frames[state])];
    }).concat(this.#errors());
  }

  /** Film: the certificates, below their images. */
  #errors() {
    this.errors = this.cells.map(() => Object.assign(element("span"), { className: "certificate" }));
    return [Object.assign(element("span", "round trip"), { className: "label" }), ...this.errors];
  }

  /** Grid: a stop of the scrubber, with the chosen image as it was then. */
  #stop(name, state) {
    const label = element("label");
    const input = Object.assign(element("input"), { type: "radio", name: "state", value: state, checked: state === this.last });
    const title = element("span", name);
    title.className = "row";
    title.append(time());
    label.append(input, this.#canvas(), title);
    return label;
  }

  #times() {
    const longest = Math.max(...this.seconds);
    for (const [state, place] of document.querySelectorAll("#drawing .row").entries()) {
      const [words, bar] = place.querySelector(".time").children;
      const seconds = this.seconds[state];
      words.textContent = seconds ? duration(seconds) : "";
      bar.style.width = longest ? `${(100 * seconds) / longest}%` : "0";
    }
  }

  // --- pixels -------------------------------------------------------------------------------------------------------

  /** A picture of `count` images goes into the sheet of `state`, from image `first` on. */
  async #put(state, first, count, columns, picture) {
    const size = this.size;
    const source = new Image();
    source.src = `data:image/png;base64,${picture}`;
    await source.decode();
    const context = this.sheets[state].getContext("2d");
    for (let k = 0; k < count; k++) {
      const image = first + k;
      const from = [(k % columns) * size, Math.floor(k / columns) * size];
      const to = [(image % this.columns) * size, Math.floor(image / this.columns) * size];
      context.drawImage(source, ...from, size, size, ...to, size, size);
      this.reached[image] = state;
      this.#paint(image);
      if (this.film) this.#copyTo(this.frames[state][image], state, image).classList.add("filled");
    }
    this.#stopPicture(state);
    this.#times();
  }

  #paint(image) {
    if (!this.film) this.#copyTo(this.cells[image].firstChild, Math.min(this.shown, this.reached[image]), image);
  }

  #stopPicture(state) {
    if (!this.film) this.#copyTo(this.stops[state].querySelector("canvas"), state, this.chosen);
  }

  #canvas(columns = 1, rows = 1) {
    return Object.assign(element("canvas"), { width: columns * this.size, height: rows * this.size });
  }

  #copyTo(canvas, state, image) {
    const size = this.size;
    canvas.width = canvas.height = size;
    const x = (image % this.columns) * size, y = Math.floor(image / this.columns) * size;
    canvas.getContext("2d").drawImage(this.sheets[state], x, y, size, size, 0, 0, size, size);
    canvas.classList.toggle("crisp", size <= 32);
    return canvas;
  }

  /** What is asked for, as large as the server's pictures of it: each pixel repeated. */
  #enlarged(image) {
    const size = this.size, side = size * Math.max(1, Math.floor(48 / size));
    const canvas = Object.assign(element("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const x = (image % this.columns) * size, y = Math.floor(image / this.columns) * size;
    context.drawImage(this.sheets[this.last], x, y, size, size, 0, 0, side, side);
    return canvas;
  }

  #picture(state) {
    return this.#copyTo(this.#canvas(), state, this.chosen);
  }

  // --- the chosen image ---------------------------------------------------------------------------------------------

  #name(image = this.chosen) {
    const label = this.labels?.[image] ?? -1;
    return `Image ${this.first + image}${label < 0 ? "" : `, class ${className(this.model, label)}`}`;
  }

  #walk(event) {
    const columns = this.film ? this.n : this.columns;
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -this.n, End: this.n }[event.key];
    if (!by) return;
    event.preventDefault();
    const from = this.chosen;
    const inside = from + by >= 0 && from + by < this.n;
    const to = inside ? from + by : Math.abs(by) === this.n ? (by < 0 ? 0 : this.n - 1) : from;
    this.choose(to);
    this.cells[to].focus();
  }

  async #copy() {
    const link = new URL(at("sample-link").getAttribute("href"), location.href).href;
    const copied = await navigator.clipboard?.writeText(link).then(() => true, () => false);
    at("sample-copy").textContent = copied ? "Copied" : "Not allowed here";
  }

}

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function time() {
  const place = element("span");
  place.className = "time";
  place.append(element("span"), element("i"));
  return place;
}
