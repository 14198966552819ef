// First of three parts of the report's script: the data, as rows with what is searched and sorted by, and the head of the
// page. Texts of models become text nodes or attributes everywhere, never markup.
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const LEVELS = [0.02, 0.1, 0.5, 1, 2]; // nats; the same in every report, so that colours mean the same
const CONTEXT = 3; // tokens kept around a marked one
const two = data.students.length === 2;
const letters = two ? ["A", "B"] : ["student"];
const classes = ["a", "b"];

// -- small helpers ---------------------------------------------------------------------------------------------
function make(namespace, tag, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const digits = (x) => (Math.abs(x) >= 10 ? 1 : Math.abs(x) >= 1 ? 2 : 3);
const nats = (x) => (x === null ? "n/a" : x.toFixed(digits(x)).replace("-", "−"));
const points = (reward) => (reward === null ? "n/a" : String(Number(reward.toPrecision(3))).replace("-", "−"));
const short = (x) => (x === null ? "n/a" : x < 0.005 ? "0" : x.toFixed(x >= 10 ? 0 : x >= 1 ? 1 : 2).replace(/^0/, ""));
const count = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
function percent(p) {
  if (p === null) return "n/a";
  if (p === 0 || p === 1) return `${100 * p}%`;
  if (p < 0.0005) return "<0.1%";
  return p < 1 && p > 0.999 ? ">99.9%" : `${(100 * p).toFixed(1)}%`;
}
const level = (kl) => (kl === null ? LEVELS.length : LEVELS.filter((least) => kl >= least).length);
const mean = (xs) => (xs.length ? xs.reduce((a, b) => a + b, 0) / xs.length : 0);
const numbers = (xs) => xs.filter((x) => x !== null);

// -- tokens as text --------------------------------------------------------------------------------------------
// Controls, zero-width characters and those that turn the direction of writing: shown, never obeyed.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;
const KNOWN = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
const named = (c) => KNOWN[c] || `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const name = (id) => data.labels[id] ?? `<id ${id}>`;
function inWords(text) { // for the panel and for a screen reader: every space counts
  return [...text].map((c) => (c === " " ? "␣" : INVISIBLE.test(c) ? named(c) : c)).join("") || "␣";
}
function drawText(node, text) {
  const blank = /^ +$/.test(text);
  let plain = "";
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  for (const c of text) {
    if (!(blank || INVISIBLE.test(c))) { plain += c; continue; }
    flush();
    node.append(el("i", { class: "c" }, blank ? "·" : named(c)));
    if (c === "\n" || c === "\t") node.append(c);
    if (blank) node.append("\u200b"); // lines may break here
  }
  flush();
}

// -- rows ------------------------------------------------------------------------------------------------------
const rows = data.rows.map((row, index) => {
  const shown = row.texts.map((text, i) => text || name(row.ids[i]));
  let at = 0;
  const starts = row.texts.map((text) => { const start = at; at += text.length; return start; });
  const found = row.views.map((view) => numbers(view.kl));
  return { ...row, index, shown, starts, text: row.texts.join(""), hits: new Set(),
    means: found.map(mean), max: Math.max(0, ...found[0]) };
});
rows.forEach((row) => { row.lower = row.text.toLowerCase(); row.lowerPrompt = row.prompt.toLowerCase(); });
const every = rows.flatMap((row) => numbers(row.views[0].kl)).sort((a, b) => a - b);
const highest = Math.max(every[every.length - 1] || 0, 0.02);
const rewarded = rows.some((row) => row.reward !== null);
const SORTS = {
  mean: ["mean KL, highest first", (a, b) => b.means[0] - a.means[0]],
  max: ["worst token first", (a, b) => b.max - a.max],
  ...(two && { change: ["KL rose most, A to B", (a, b) => b.means[1] - b.means[0] - a.means[1] + a.means[0]] }),
  ...(rewarded && { reward: ["reward, lowest first", (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity)] }),
  length: ["longest first", (a, b) => b.ids.length - a.ids.length],
  order: ["as written", (a, b) => a.index - b.index],
};
const texts = rows.some((row) => row.spans.length); // the teacher has another tokenizer
rows.forEach((row) => { row.spans = row.spans.map(([start, stop, student, teacher, exact, charged]) => ({ start, stop, student, teacher, exact, charged })); });
const spanOf = (row, i) => row.spans.find((span) => span.start <= i && i < span.stop);
const state = { query: "", limit: 0, only: false };
const isMarked = (row, view, i) => row.views[view].kl[i] === null || row.views[view].kl[i] >= state.limit;
const anyMarked = (row, i) => row.views.some((_, view) => isMarked(row, view, i));

// -- head of the page ------------------------------------------------------------------------------------------
function drawHead() {
  $("title").append(data.title);
  const who = two ? [el("b", { class: "a" }, `A: ${data.students[0]}`), " (who wrote these completions) and ",
    el("b", { class: "b" }, `B: ${data.students[1]}`)] : [el("b", {}, data.students[0])];
  $("who").append("Student ", ...who, ", judged by ", el("b", {}, data.teacher));
  $("summary").append(two ? comparison() : tiles(data.summaries[0]));
  const settings = Object.entries(data.settings).map(([key, value]) => `${key} ${value}`).join(" · ");
  $("foot").append(texts ? "KL between texts, in nats: that of a span stands at its first token. " : "KL in nats per token, over the whole vocabulary. ", settings);
  const legend = LEVELS.map((least, i) => el("span", { class: `t k${i + 1}` }, ` ≥ ${least} `));
  $("legend").append("KL in nats:", el("span", { class: "t" }, ` < ${LEVELS[0]} `), ...legend,
    el("span", { class: "t marked" }, " bold, in a box: marked "),
    texts ? el("span", { class: "t sampled" }, " dotted: in a span that is not exact ") : "");
}
function tiles(s) {
  const parts = [["completions", s.completions, count(s.tokens, "token")],
    ["KL(student ‖ teacher)", nats(s.kl), "nats per token"], ["KL(teacher ‖ student)", nats(s.forward_kl), "nats per token"],
    ["same first choice", percent(s.agreement), "of tokens"], ["reward", s.reward === null ? null : points(s.reward), "mean"],
    ["cut at the limit", percent(s.truncated), "of completions"]];
  return el("dl", { class: "tiles" }, ...parts.filter((part) => part[1] !== null).map(([what, value, unit]) =>
    el("div", { class: "tile" }, el("dt", {}, what), el("dd", {}, String(value), " ", el("small", {}, unit)))));
}
function comparison() {
  const number = (of) => (s) => (s[of] === null ? "n/a" : nats(s[of]));
  const lines = [["KL(student ‖ teacher)", number("kl")], ["KL(teacher ‖ student)", number("forward_kl")],
    ["same first choice", (s) => percent(s.agreement)], ["log-probability", number("log_prob")],
    ["reward", (s) => points(s.reward)], ["tokens each", (s) => (s.tokens / s.completions).toFixed(1)],
    ["cut at the limit", (s) => percent(s.truncated)]];
  const groups = [["on A's completions", data.summaries, 4], ["each on its own", data.own, lines.length]].filter(([, of]) => of.length);
  const cells = (inside) => groups.flatMap(([, of, known]) => of.map((s, i) => inside(s, i, known)));
  return el("table", {},
    el("thead", {}, el("tr", {}, el("td", {}), ...groups.map(([title]) => el("th", { colspan: 2, scope: "colgroup" }, title))),
      el("tr", {}, el("td", {}), ...cells((_, i) => el("th", { scope: "col", class: classes[i] }, letters[i])))),
    el("tbody", {}, ...lines.filter(([, of]) => [...data.summaries, ...data.own].some((s) => of(s) !== "n/a")).map(([what, of], n) =>
      el("tr", {}, el("th", { scope: "row" }, what), ...cells((s, _, known) => el("td", {}, n < known ? of(s) : ""))))));
}
function drawCurve() {
  const figure = $("curve"), last = Math.max(0, ...data.curves.flat().map((p) => p.last));
  if (last < 2) return;
  figure.hidden = false;
  const W = Math.min(960, figure.clientWidth || 960), H = 210, left = 52, right = 14, top = 12, bottom = 42;
  const raw = Math.max(...data.curves.flat().map((p) => p.kl), 1e-3), unit = 10 ** Math.floor(Math.log10(raw));
  const high = unit * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((m) => m * unit >= raw);
  const x = (at) => left + (W - left - right) * (at - 1) / (last - 1), y = (kl) => H - bottom - (H - top - bottom) * kl / high;
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    parts.push(svg("line", { class: "grid", x1: left, x2: W - right, y1: y(part * high), y2: y(part * high) }),
      svg("text", { x: left - 6, y: y(part * high) + 4, "text-anchor": "end" }, String(+(part * high).toPrecision(3))));
  }
  const ticks = [...new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(1 + part * (last - 1))))];
  ticks.forEach((at) => parts.push(svg("text", { x: x(at), y: H - bottom + 17, "text-anchor": at === last ? "end" : "middle" }, String(at))));
  parts.push(svg("text", { x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, "position in the completion, tokens"),
    svg("text", { transform: `translate(13 ${(H - bottom + top) / 2}) rotate(-90)`, "text-anchor": "middle" }, "mean KL, nats"));
  data.curves.forEach((points, i) => parts.push(svg("path", { class: `line ${classes[i]}`,
    d: points.map((p, n) => `${n ? "L" : "M"}${x((p.first + p.last) / 2).toFixed(1)} ${y(p.kl).toFixed(1)}`).join("") })));
  const worst = data.curves[0].reduce((a, b) => (b.kl > a.kl ? b : a));
  const alt = `Mean KL by position. Highest at position ${worst.first}: ${nats(worst.kl)} nats over ${count(worst.count, "token")}.`;
  figure.replaceChildren(svg("svg", { viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": alt }, ...parts),
    el("figcaption", {}, alt, two ? " A is the solid line, B the dashed one." : ""));
}
