// The certificate of every image on one logarithmic axis: a dot an image, the chosen one marked.

import { error } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const [LEAST, MOST] = [-8, 0]; // powers of ten
const TICKS = [-8, -6, -4, -2, 0];
const WIDTH = 260, MARGIN = 14, AXIS = 42, LANES = 4;

export class Certificates {
  /** `limit` is the error above which a drawing as usual is suspect; each drawing brings its own. */
  constructor(svg, limit) {
    this.svg = svg;
    this.judgeBy(limit);
  }

  judgeBy(limit) {
    this.limit = limit;
    document.getElementById("suspect").textContent = `; above ${limit} is suspect`;
  }

  isSuspect(value) {
    return value === null || value > this.limit;
  }

  /** `values` (N,), null where an image is not finite; `pick(i)` is called when a dot is clicked. */
  show(values, chosen, pick) {
    const order = [...values.keys()].filter((i) => i !== chosen).concat(chosen); // the chosen one on top
    const dots = order.map((i) => {
      const dot = made("circle", { cx: place(values[i]), cy: AXIS - 8 - (i % LANES) * 7, r: i === chosen ? 5 : 3 });
      dot.setAttribute("class", `${i === chosen ? "chosen" : ""} ${this.isSuspect(values[i]) ? "suspect" : ""}`);
      dot.addEventListener("click", () => pick(i));
      return dot;
    });
    this.svg.replaceChildren(...axis(), ...dots);
    const told = values.filter((value) => value !== null);
    this.svg.setAttribute("aria-label", `Round-trip errors: ${values.length} images, chosen ${error(values[chosen])}, ` +
      (told.length ? `from ${error(Math.min(...told))} to ${error(Math.max(...told))}` : "none finite"));
  }
}

function place(value) {
  const power = value === null ? MOST : Math.log10(Math.max(value, 1e-30));
  const part = (Math.min(Math.max(power, LEAST), MOST) - LEAST) / (MOST - LEAST);
  return MARGIN + part * (WIDTH - 2 * MARGIN);
}

function axis() {
  const line = made("line", { x1: MARGIN, x2: WIDTH - MARGIN, y1: AXIS, y2: AXIS });
  return [line, ...TICKS.flatMap((power) => {
    const x = place(10 ** power);
    const text = made("text", { x, y: AXIS + 14 });
    text.textContent = power === 0 ? "1" : "10";
    if (power) {
      const exponent = made("tspan", { dy: -4, class: "power" });
      exponent.textContent = `−${-power}`;
      text.append(exponent);
    }
    return [made("line", { x1: x, x2: x, y1: AXIS, y2: AXIS + 3 }), text];
  })];
}

function made(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
