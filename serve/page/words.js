// Numbers and refusals, as people read them.

/** "1.2e-5" as 1.2 · 10⁻⁵ would be: short, and plain enough to be read out. */
export const error = (value) => (value === null ? "not finite" : value === 0 ? "0" : value.toExponential(1));

export function duration(seconds) {
  if (seconds < 0.0995) return `${(seconds * 1000).toPrecision(2)} ms`;
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toPrecision(3)} s`;
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** What to call a class: its name, else its number. */
export const className = (model, label) => model.class_names?.[label] ?? String(label);

const rate = (value) => (value < 10 ? value.toPrecision(2) : Math.round(value));

const NAMED = 8; // broken images: more make no better sentence

/** The line above a finished drawing. */
export function summary({ certificate, nonfinite, seconds }) {
  const count = certificate.length;
  const told = `${plural(count, "image")} in ${duration(seconds)}, ${rate(count / seconds)} a second`;
  if (!nonfinite.length) return `${told}; largest round-trip error ${error(Math.max(...certificate))}.`;
  const names = nonfinite.slice(0, NAMED).join(", ") + (nonfinite.length > NAMED ? ", …" : "");
  return `${told}; ${plural(nonfinite.length, "image")} overflowed (${names}): try less guidance.`;
}

const timers = new WeakMap();

/** Show a refusal in `place`, and count down to when the server says it can be tried again. */
export function showRefusal(place, refused) {
  clearInterval(timers.get(place));
  place.textContent = refused.message;
  place.hidden = false;
  if (!refused.wait) return;
  const until = Date.now() + refused.wait * 1000;
  const when = document.createElement("span");
  when.className = "when";
  place.append(" ", when);
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    when.textContent = left > 0 ? `Try again in ${left} s.` : "Try again now.";
    if (left <= 0) clearInterval(timers.get(place));
  };
  tick();
  timers.set(place, setInterval(tick, 1000));
}

export function clearRefusal(place) {
  clearInterval(timers.get(place));
  place.hidden = true;
}
