"use strict";
// Talks to the server that sent it, and to no other. Whatever a model prints is put in as text, never as markup.
const $ = (id) => document.getElementById(id);
const messages = [];
let running = null; // what aborts the answers that are on their way
let key = sessionStorage.getItem("layerskip-key") || "";
let model = null;

function headers() {
  const told = { "Content-Type": "application/json" };
  if (key) told.Authorization = `Bearer ${key}`;
  return told;
}

async function connect() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) {
    key = window.prompt("This server asks for a key") || "";
    sessionStorage.setItem("layerskip-key", key);
    if (key) return connect();
  }
  if (!answer.ok) throw new Error(`the server says ${answer.status}`);
  model = (await answer.json()).data[0];
  const own = model.layerskip;
  const sources = { auto: "exit and copies", exit: "the exit", lookup: "copies" };
  const exit = own.draft_length ? ` (${own.draft_length} tokens by layer ${own.exit_layer} of ${own.layers})` : "";
  const drafts = own.mode === "ar" || own.drafter === "off" ? "plain decoding" : `drafts by ${sources[own.drafter]}${exit}`;
  $("model").textContent = `${model.id} · ${own.dtype} · ${drafts} · ${model.max_model_len} tokens of context`;
  $("exit").max = own.layers - 1;
  $("exit").min = Math.min(0, ...own.exits) - 1;
  $("exit").value = $("exit").min;
  $("tokens").max = Math.min(1024, model.max_model_len);
}

function settings(plain) {
  if (plain) return { mode: "ar", rounds: true };
  const own = { rounds: true };
  const source = $("source").value;
  if (source) own.drafter = source;
  if (source === "off" || source === "lookup") return own;
  if ($("exit").value !== $("exit").min) own.exit_layer = Number($("exit").value);
  if ($("length").value !== "0") own.draft_length = Number($("length").value);
  if ((own.exit_layer !== undefined || own.draft_length !== undefined) && !source) own.drafter = "auto";
  return own;
}

// Read server-sent events of a request; calls `told` with each chunk.
async function stream(body, signal, told) {
  const answer = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) {
    const error = (await answer.json().catch(() => ({}))).error || {};
    throw new Error(error.message || `the server says ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    left += value;
    const events = left.split("\n\n");
    left = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      told(chunk);
    }
  }
}

function token(text, kind) {
  const span = document.createElement("span");
  span.className = `token ${kind}`;
  span.textContent = text;
  return span;
}

function turn(role, name) {
  const div = document.createElement("div");
  div.className = `turn ${role}`;
  if (name) {
    const label = document.createElement("span");
    label.className = "lane-name";
    label.textContent = name;
    div.append(label);
  }
  return div;
}

// One answer: where it is written, and what is counted of it.
class Lane {
  constructor(place, shown) {
    this.place = place;
    this.shown = shown; // whether the panel shows its numbers
    this.text = "";
    this.began = performance.now();
    this.first = this.last = null;
    this.tokens = this.rounds = 0;
    this.drafted = { exit: 0, lookup: 0 };
    this.kept = { exit: 0, lookup: 0 };
  }
  take(round) {
    if (!round.tokens.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += round.tokens.length;
    if (round.source !== "prefill") this.rounds += 1;
    const kept = round.tokens.filter((one) => one.fate !== "plain").length;
    if (round.source in this.drafted) {
      this.drafted[round.source] += kept + round.rejected.length;
      this.kept[round.source] += kept;
    }
    const parts = round.tokens.map((one) => token(one.text, one.fate));
    parts.splice(kept, 0, ...round.rejected.map((text) => token(text, "lost")));
    this.place.append(...parts);
    this.text += round.tokens.map((one) => one.text).join("");
    if (this.shown) this.show(round);
  }
  get speed() {
    return this.tokens > 1 ? (1000 * (this.tokens - 1)) / (this.last - this.first) : null;
  }
  show(round) {
    const share = (source) => (this.drafted[source] ? `${Math.round((100 * this.kept[source]) / this.drafted[source])}% of ${this.drafted[source]}` : "–");
    $("speed").textContent = this.speed ? this.speed.toFixed(1) : "–";
    $("per-round").textContent = this.rounds ? ((this.tokens - 1) / this.rounds).toFixed(2) : "–";
    $("kept-exit").textContent = share("exit");
    $("kept-lookup").textContent = share("lookup");
    $("first").textContent = `${Math.round(this.first - this.began)} ms`;
    const bar = document.createElement("button");
    const told = `${round.source}: ${round.tokens.length} tokens, ${round.rejected.length} rejected, ${(1000 * round.seconds).toFixed(1)} ms`;
    bar.type = "button";
    bar.tabIndex = -1;
    bar.className = `bar ${round.rejected.length || round.tokens.length > 1 ? round.source : "plain"}`;
    bar.style.setProperty("height", `${Math.min(100, 12 * round.tokens.length)}%`);
    bar.title = told;
    bar.addEventListener("click", () => { $("detail").textContent = told; });
    $("timeline").append(bar);
    $("timeline").scrollLeft = $("timeline").scrollWidth;
  }
}

async function answer(lane, plain, signal) {
  const body = {
    messages, stream: true, max_tokens: Number($("tokens").value), temperature: Number($("temperature").value),
    seed: 0, layerskip: settings(plain),
  };
  await stream(body, signal, (chunk) => {
    for (const choice of chunk.choices) for (const round of choice.layerskip?.rounds ?? []) lane.take(round);
    const near = window.innerHeight + window.scrollY > document.body.scrollHeight - 200;
    if (near) window.scrollTo(0, document.body.scrollHeight);
  });
}

function verdict(ours, plain) {
  const p = document.createElement("p");
  const same = ours.text === plain.text;
  p.className = `verdict ${same ? "same" : "other"}`;
  const faster = ours.speed && plain.speed ? `${(ours.speed / plain.speed).toFixed(2)} x the tokens/s of plain decoding` : "";
  p.textContent = same ? `The texts are equal. ${faster}` : `The texts differ. ${faster}`;
  return p;
}

async function send(text) {
  const own = { role: "user", content: text };
  messages.push(own);
  const asked = turn("user");
  asked.textContent = text;
  $("turns").append(asked);
  $("timeline").replaceChildren();
  $("detail").textContent = "";
  const race = $("race").checked;
  const place = document.createElement("div");
  $("turns").append(place);
  const lanes = (race ? ["with drafts", "plain"] : [""]).map((name, i) => {
    const div = turn("assistant", name);
    place.append(div);
    return new Lane(div, i === 0);
  });
  if (race) place.className = "pair";
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    await answer(lanes[0], false, running.signal);
    if (race) {
      await answer(Object.assign(lanes[1], { began: performance.now() }), true, running.signal);
      place.after(verdict(lanes[0], lanes[1]));
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const p = document.createElement("p");
      p.className = "error";
      p.setAttribute("role", "alert");
      p.textContent = error.message;
      $("turns").append(p);
    }
  } finally {
    if (messages.at(-1) !== own) place.remove(); // cleared meanwhile
    else if (lanes[0].text) messages.push({ role: "assistant", content: lanes[0].text });
    else messages.pop();
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("prompt").focus();
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("turns").replaceChildren();
  $("timeline").replaceChildren();
});
$("rejected").addEventListener("change", () => document.body.classList.toggle("with-rejected", $("rejected").checked));
for (const [name, unsaid] of [["exit", true], ["length", true], ["tokens", false], ["temperature", false]]) {
  const show = () => {
    const input = $(name);
    $(`${name}-value`).textContent = unsaid && input.value === input.min ? "as the model says" : input.value;
  };
  $(name).addEventListener("input", show);
}
connect().catch((error) => { $("model").textContent = error.message; });
