// The server as the page talks to it: the token, refusals in words, streams of events.
// Addresses are relative to the page, so that it works behind a proxy's prefix.

const dialog = document.getElementById("token-dialog");
document.getElementById("token-cancel").addEventListener("click", () => dialog.close("cancel"));
let token = sessionStorage.getItem("tarflow-token") ?? "";

/** Why a request was not answered. `wait` is the number of seconds the server asks for, or undefined. */
export class Refusal extends Error {
  constructor(message, wait) {
    super(message);
    this.wait = wait;
  }
}

const hasToken = () => token !== "";

/** fetch(), with the token where one is needed; anything but success throws a Refusal in words. */
export async function ask(path, options = {}) {
  for (let attempt = 0; ; attempt++) {
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The server does not answer. See whether tarflow serve is still running, then try again.");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (!(await askForToken(attempt > 0 || token !== ""))) throw new Refusal("This server needs a token.");
  }
}

/** A browser follows a link without the token; so with one the page fetches what is there itself, and shows that. */
export async function openWithToken(event) {
  if (!hasToken()) return;
  event.preventDefault();
  const blob = await (await ask(event.currentTarget.href)).blob();
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), target: "_blank", rel: "noopener" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The events of a stream, as { name, data }. Throws a Refusal if the connection ends early. */
export async function* events(path, signal) {
  const response = await ask(path, { signal, headers: { Accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = parse(part);
      if (event) yield event;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server went away before the images were done. Start it again, then draw again.");
  }
}

function parse(text) {
  const fields = {};
  for (const line of text.split("\n")) {
    const colon = line.indexOf(":");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart(); // a leading colon is a comment
  }
  return fields.data && { name: fields.event, data: JSON.parse(fields.data) };
}

async function refusal(response) {
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const body = await response.json().catch(() => null);
  return new Refusal(message(body) ?? `The server answered ${response.status}.`, wait >= 0 ? wait : undefined);
}

/** What the server says: a sentence, or a list of the fields that are wrong. */
function message(body) {
  const said = body?.error ?? body?.detail;
  if (typeof said === "string") return said;
  if (typeof said?.message === "string") return said.message;
  if (!Array.isArray(said)) return undefined;
  return said.map((item) => `${item.loc?.at(-1) ?? "request"}: ${item.msg}`).join("; ");
}

let asking = null; // one dialog, however many requests wait for it

function askForToken(wasWrong) {
  asking ??= new Promise((resolve) => {
    const field = document.getElementById("token");
    const why = document.getElementById("token-why");
    if (wasWrong) why.textContent = "The server did not accept that token.";
    field.value = "";
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "ok" ? field.value.trim() : "";
      if (given) {
        token = given;
        sessionStorage.setItem("tarflow-token", token);
      }
      field.value = "";
      resolve(given !== "");
    }, { once: true });
    dialog.showModal();
    field.focus();
  });
  return asking;
}
