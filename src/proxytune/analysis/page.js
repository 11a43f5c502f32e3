
"use strict";
// Text of an answer is only ever set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const UNKNOWN = data.steered ? "–" : "unknown"; // a trace leaves out infinite numbers, a log what it does not know
const EXACT = 0.005; // half a step of the slider

function make(tag, classes = "", content = [], attributes = {}) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}
const known = (value) => value !== null && value !== undefined;
const textOf = (id) => data.texts[id] ?? `#${id}`;
const visible = (text) => JSON.stringify(text).replace(/[\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
  (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const quoted = (id) => make("bdi", "quoted", visible(textOf(id)));
const share = (p) => !known(p) ? UNKNOWN : p > 0 && p < 0.0005 ? "<0.1 %" : p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toFixed(1)} %`;
const ofLog = (log) => known(log) ? Math.exp(log) : null;
const number = (value) => known(value) ? value.toFixed(2) : UNKNOWN;

// -- alpha -----------------------------------------------------------------------------------------------------
const state = { token: 0, pinned: false, expert: 0, alpha: data.alpha[0] ?? 0, unsteered: false };
const recorded = () => data.alpha[state.expert];
const asRecorded = () => Math.abs(state.alpha - recorded()) < EXACT;

// What greedy decoding chooses at an alpha of the expert: exact, recorded over the whole vocabulary.
function choice(token, alpha) {
  let found = null;
  for (const [from, id] of token.flips[state.expert] ?? []) if (from <= alpha) found = id;
  return found;
}
function flipsNow(token) {
  if (asRecorded() || token.kind === "given" || !(token.flips[state.expert] ?? []).length) return false;
  const before = recorded() >= 0 && recorded() <= 3 ? choice(token, recorded()) : token.id;
  return choice(token, state.alpha) !== before;
}
// The candidates in the order of an alpha, with their shares: [candidate, probability].
function ranked(token) {
  const scored = token.candidates.map((each) => {
    const [, base, mixture, deltas, masked] = each;
    if (!data.steered || asRecorded()) return [each, mixture];
    let score = masked || !known(base) ? null : base;
    deltas.forEach((delta, k) => {
      const alpha = k === state.expert ? state.alpha : data.alpha[k];
      if (alpha !== 0) score = known(score) && known(delta) ? score + alpha * delta : null;
    });
    return [each, score];
  });
  scored.sort((a, b) => (b[1] ?? -Infinity) - (a[1] ?? -Infinity) || (b[0][1] ?? -Infinity) - (a[0][1] ?? -Infinity));
  if (!data.steered || asRecorded()) return scored.map(([each, log]) => [each, ofLog(log)]);
  const most = Math.max(...scored.map(([, score]) => score ?? -Infinity));
  const weights = scored.map(([, score]) => known(score) ? Math.exp(score - most) : 0);
  const sum = weights.reduce((a, b) => a + b, 0) || 1;
  return scored.map(([each], k) => [each, weights[k] / sum]);
}

// -- the answer ------------------------------------------------------------------------------------------------
const spans = []; // of each token the element that shows it
const level = (kl) => !known(kl) || kl < 0.5 ? "near" : kl < 1.5 ? "far" : "farthest";

function drawAnswer() {
  for (const [text, first, count, special] of data.pieces) {
    const token = data.tokens[first];
    const classes = ["token", token.kind, level(token.kl)];
    if (special) classes.push("special");
    if (/^\s*\n/.test(text)) classes.push("line");
    if (text === "") classes.push("empty");
    const label = `token ${first + 1}: ${visible(text)}, ${token.kind}`;
    const span = make("span", classes.join(" "), text, { role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": label });
    span.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse" && !state.pinned) show(first); });
    span.addEventListener("click", () => { state.pinned = true; show(first, true); });
    span.addEventListener("focus", () => { if (spans[state.token] !== span) show(first); });
    for (let k = 0; k < count; k++) spans.push(span);
    at("answer").append(span);
  }
  at("answer").addEventListener("keydown", (event) => {
    const forward = getComputedStyle(at("answer")).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const last = data.tokens.length - 1;
    const steps = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last };
    if (!(event.key in steps)) return;
    let step = steps[event.key];
    if (forward === "ArrowLeft" && (event.key === "ArrowLeft" || event.key === "ArrowRight")) step = -step;
    event.preventDefault();
    state.pinned = true;
    show(Math.min(last, Math.max(0, state.token + step)), true);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") letGo(); });
}
function letGo() {
  state.pinned = false;
  document.body.classList.remove("open");
}
function show(index, focus = false) {
  spans[state.token]?.setAttribute("aria-selected", "false");
  spans[state.token]?.setAttribute("tabindex", "-1");
  state.token = index;
  const span = spans[index];
  span.setAttribute("aria-selected", "true");
  span.setAttribute("tabindex", "0");
  if (focus) {
    document.body.classList.add("open");
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }
  drawCard();
}

// -- the card of a token ---------------------------------------------------------------------------------------
// Where a token came from: the trace's word -> what the card says.
const DRAFTS = {
  drafted: "drafted by the expert, accepted", copied: "copied from the text, accepted",
  corrected: "replaces a rejected draft", plain: "none",
};
function drawCard() {
  const token = data.tokens[state.token];
  const [, first, count] = data.pieces.find(([, first, count]) => state.token < first + count);
  const close = make("button", "close", "×", { type: "button", "aria-label": "Close" });
  close.addEventListener("click", letGo);
  const facts = [["kind", token.kind], ["probability", data.steered
    ? `base ${share(ofLog(token.base_logprob))} → steered ${share(ofLog(token.mixture_logprob))}`
    : share(ofLog(token.mixture_logprob))]];
  if (data.steered) {
    facts.push(["rank in the base", known(token.base_rank) ? String(token.base_rank) : UNKNOWN]);
    facts.push(["KL", number(token.kl)], ["entropy", `base ${number(token.base_entropy)} → steered ${number(token.entropy)}`]);
    data.experts.forEach((name, k) => facts.push([
      data.experts.length > 1 ? `${name} alone` : "expert alone",
      token.choices[k] ? make("span", "", [quoted(token.choices[k][0]), ` ${share(token.choices[k][1])}`]) : "–",
    ]));
    if (token.origin) facts.push(["draft", DRAFTS[token.origin] ?? token.origin]);
  } else {
    facts.push(["the base, steering", "unknown: this log does not record them"]);
  }
  const list = make("dl");
  for (const [name, value] of facts) list.append(make("dt", "", name), make("dd", "", value));
  const parts = [close, make("h3", "", [`Token ${state.token + 1} of ${data.tokens.length}: `, quoted(token.id)])];
  if (count > 1) parts.push(make("p", "note", `Part ${state.token - first + 1} of ${count} of the text ${visible(data.pieces.find((p) => p[1] === first)[0])}.`));
  parts.push(list);
  if ((token.flips[state.expert] ?? []).length) parts.push(strip(token));
  parts.push(candidates(token));
  if (data.command) parts.push(make("div", "", [], { id: "command" }));
  at("card").replaceChildren(...parts);
}

// Which token each alpha chooses, as a strip from 0 to 3.
function strip(token) {
  const steps = token.flips[state.expert];
  const bar = make("ol", "strip", [], { "aria-label": "What greedy decoding chooses here from which alpha on" });
  steps.forEach(([from, id], k) => {
    const until = k + 1 < steps.length ? steps[k + 1][0] : 3;
    const now = from <= state.alpha && (state.alpha < until || k + 1 === steps.length);
    const item = make("li", now ? "now" : "", make("bdi", "", visible(textOf(id)).slice(1, -1)), { title: `from alpha ${from.toFixed(2)}: ${visible(textOf(id))}` });
    item.style.flex = `${Math.max(until - from, 0)} 1 0`;
    bar.append(item);
  });
  const here = make("li", "here", [], { "aria-hidden": "true" });
  here.style.left = `${(100 * Math.min(Math.max(state.alpha, 0), 3)) / 3}%`;
  bar.append(here);
  const choices = steps.length === 1
    ? ["The same token from alpha 0 to 3."]
    : ["Greedy decoding chooses ", ...steps.flatMap(([from, id], k) => [k ? `, from alpha ${from.toFixed(2)} ` : "", quoted(id)]), "."];
  return make("div", "", [bar, make("p", "note", choices)]);
}

function candidates(token) {
  const rows = ranked(token);
  const best = choice(token, state.alpha);
  const title = !data.steered ? "probability" : asRecorded() ? "steered" : `at ${state.alpha.toFixed(2)}`;
  const heads = ["candidate", ...(data.steered ? ["base", ...data.experts.map((name) => data.experts.length > 1 ? name : "expert adds")] : []), title];
  const body = make("tbody");
  const farthest = Math.max(1e-9, ...rows.flatMap(([each]) => each[3].map((delta, k) => Math.abs((delta ?? 0) * alphaOf(k)))));
  for (const [each, p] of rows) {
    const [id, base, , deltas, masked] = each;
    const name = [quoted(id)];
    if (masked) name.push(make("span", "note", " masked"));
    if (id === token.id) name.push(make("span", "note", " written"));
    const cells = [make("th", "", name, { scope: "row" })];
    if (data.steered) {
      cells.push(withBar(share(ofLog(base)), ofLog(base)));
      deltas.forEach((delta, k) => cells.push(withPush(delta, alphaOf(k), farthest)));
    }
    cells.push(withBar(share(p), p));
    if (data.command) cells.push(make("td", "", tryIt(id)));
    body.append(make("tr", `${id === best ? "chosen" : ""} ${masked ? "out" : ""}`, cells));
  }
  if (data.command) heads.push("");
  const head = make("thead", "", make("tr", "", heads.map((text) => make("th", "", text, { scope: "col" }))));
  const table = make("table", "", [make("caption", "", "Candidates, the most probable first"), head, body]);
  const notes = [];
  if (data.steered && !asRecorded()) {
    notes.push("Shares are among these candidates.");
    if (known(best) && !token.candidates.some(([id]) => id === best)) notes.push(`Greedy decoding would choose ${visible(textOf(best))}, which is not listed.`);
  }
  if (data.steered && rows.some(([each, p]) => !known(p) || !known(each[1]))) notes.push("–: excluded, or not recorded.");
  if (!rows.length) notes.push("No candidates were recorded.");
  return make("div", "wide", [table, make("p", "note", notes.join(" "))]);
}
// A command that continues from another candidate, to be copied into a shell.
function tryIt(id) {
  const button = make("button", "try", "try", { type: "button", "aria-label": `Command that continues with ${visible(textOf(id))}` });
  button.addEventListener("click", () => drawCommand(id));
  return button;
}
const shell = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
function branchOf(id) {
  const text = textOf(id);
  const alike = data.tokens[state.token].candidates.filter(([other]) => textOf(other) === text).length;
  const plain = alike === 1 && text !== "" && !/[\p{C}\ufffd]|^#\d+$/u.test(text);
  return `${state.token + 1}:${plain ? text : `#${id}`}`;
}
function drawCommand(id) {
  const [before, behind] = data.command;
  const code = make("code", "", "", { tabindex: "0" });
  const draw = () => { code.textContent = [...before, "--branch", branchOf(id), ...(state.unsteered ? ["--branch-alpha", "0"] : []), ...behind].map(shell).join(" "); };
  draw();
  const copy = make("button", "", "copy", { type: "button" });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "copied";
    } catch { // in a frame, or by an old browser
      getSelection().selectAllChildren(code);
      copy.textContent = "selected";
    }
  });
  const parts = [make("p", "", ["Go on with ", quoted(id), " at this place:"]), make("div", "command", [code, copy])];
  if (!data.tokens.some((token) => token.kind === "given")) {
    const box = make("input", "", [], { type: "checkbox" });
    box.checked = state.unsteered;
    box.addEventListener("change", () => { state.unsteered = box.checked; draw(); });
    parts.push(make("label", "", [box, " unsteered from there on"]));
  }
  at("command").replaceChildren(...parts);
  at("command").scrollIntoView({ block: "nearest" });
}
const alphaOf = (k) => k === state.expert ? state.alpha : data.alpha[k];
function withBar(text, p) {
  const bar = make("span", "bar", [], { "aria-hidden": "true" });
  bar.style.width = `${100 * Math.min(1, p ?? 0)}%`;
  return make("td", "", known(p) ? [text, bar] : text);
}
function withPush(delta, alpha, farthest) {
  if (!known(delta)) return make("td", "", "–");
  const push = alpha * delta;
  const bar = make("span", `bar ${push < 0 ? "down" : "up"}`);
  bar.style.width = `${(50 * Math.abs(push)) / farthest}%`;
  return make("td", "", [`${push < 0 ? "−" : "+"}${Math.abs(push).toFixed(2)}`, make("span", "track", bar, { "aria-hidden": "true" })]);
}

// -- around the answer -----------------------------------------------------------------------------------------
function drawControls() {
  if (!data.steered || !data.tokens.some((token) => token.flips.some((steps) => steps.length))) return;
  at("controls").hidden = false;
  at("of-expert").textContent = data.experts.length > 1 ? "of" : "";
  at("expert").hidden = data.experts.length < 2;
  data.experts.forEach((name, k) => at("expert").append(make("option", "", name, { value: String(k) })));
  at("expert").addEventListener("change", () => { state.expert = Number(at("expert").value); set(recorded()); });
  at("alpha").addEventListener("input", () => set(Number(at("alpha").value)));
  at("reset").addEventListener("click", () => set(recorded()));
  set(recorded());
}
function set(alpha) {
  state.alpha = alpha;
  at("alpha").value = String(alpha);
  at("alpha").setAttribute("aria-valuetext", alpha.toFixed(2));
  at("alpha-value").textContent = alpha.toFixed(2);
  at("reset").disabled = asRecorded();
  let count = 0;
  for (const [, first, length] of data.pieces) {
    const flips = data.tokens.slice(first, first + length).filter(flipsNow).length;
    spans[first].classList.toggle("flips", flips > 0);
    count += flips;
  }
  at("effect").textContent = asRecorded()
    ? `The answer was written at alpha ${recorded()}. Move the slider to see where another alpha would choose another token.`
    : `At alpha ${alpha.toFixed(2)} greedy decoding would choose another token at ${count} of ${data.tokens.length} places (framed). The text before each place stays as it was.`;
  drawCard();
}
function drawLegend() {
  for (const [kind, meaning] of Object.entries(data.kinds)) {
    at("legend").append(make("li", "", [make("span", `token ${kind} far`, kind), ` ${meaning}`]));
  }
  if (data.steered) at("legend").append(make("li", "", "The stronger the colour, the further steering moved the probabilities there (KL, steps at 0.5 and 1.5 nats)."));
}
function drawRest() {
  at("prompt").textContent = data.prompt ?? "unknown";
  at("prompt-box").open = (data.prompt ?? "").length < 400;
  at("own").hidden = !data.own.length;
  for (const [name, text] of data.own) {
    const who = name === "base" ? name : data.experts.length > 1 ? `expert ${name}` : "expert";
    at("own-answers").append(make("div", "", [make("h3", "", `${who} alone`), make("div", "own-answer text", text || "(empty)", { dir: "auto" })]));
  }
  const { count, kinds, kl, conflict, promoted, demoted } = data.totals;
  const parts = Object.entries(kinds).map(([kind, n]) => `${n} ${kind}` + (count && kind !== "given" ? ` (${share(n / count)})` : ""));
  const counted = data.steered ? `: ${parts.join(", ") || "none"}.` : ". What steering did to them is unknown: this log does not record it.";
  at("totals").append(make("p", "", `${data.tokens.length} tokens${counted}` + (known(kl) ? ` Mean KL ${kl.toFixed(2)} nats.` : "")));
  if (conflict) at("totals").append(make("p", "", `${conflict}.`));
  for (const [title, pairs] of [["Most promoted", promoted], ["Most demoted", demoted]]) {
    if (!pairs.length) continue;
    const line = make("p", "", `${title} (probability, summed over all places): `);
    pairs.forEach(([text, shift], k) => line.append(k ? ", " : "", make("span", "pair", [make("bdi", "quoted", visible(text)), ` ${shift < 0 ? "−" : "+"}${Math.abs(shift).toFixed(2)}`])));
    at("totals").append(line);
  }
  at("moves").hidden = !data.moves.length;
  at("moves-title").textContent = data.steered ? "The largest moves" : "The least probable tokens";
  const heads = data.steered ? ["token", "written", "KL", "base → steered"] : ["token", "written", "probability"];
  const body = make("tbody");
  for (const index of data.moves) {
    const token = data.tokens[index];
    const go = make("button", "", String(index + 1), { type: "button", "aria-label": `Show token ${index + 1}, ${token.kind}` });
    const marked = make("span", `token ${token.kind} ${level(token.kl)}`, quoted(token.id));
    const row = make("tr", "", [make("td", "", go), make("td", "", marked)]);
    const rest = data.steered
      ? [number(token.kl), `${share(ofLog(token.base_logprob))} → ${share(ofLog(token.mixture_logprob))}`]
      : [share(ofLog(token.mixture_logprob))];
    row.append(...rest.map((text) => make("td", "", text)));
    row.addEventListener("click", () => { state.pinned = true; show(index, true); });
    body.append(row);
  }
  at("moves-table").append(make("thead", "", make("tr", "", heads.map((text) => make("th", "", text, { scope: "col" })))), body);
}

drawAnswer();
drawLegend();
drawRest();
if (data.tokens.length) {
  const inText = (index) => data.pieces.some(([, first, count, special]) => !special && first <= index && index < first + count);
  show(data.moves.find(inText) ?? data.moves[0] ?? 0);
  drawControls();
} else {
  at("card").textContent = "The answer has no tokens.";
}
