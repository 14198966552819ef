// Third part: the panel beside the cards (on a phone, below them), pointer and keys. The last lines start the page.
// -- the panel -------------------------------------------------------------------------------------------------
let current = null, pinned = false;
const spelled = (texts) => texts.split(" | ").map(inWords).join(" | "); // the tokens of a span
function outline() {
  document.querySelectorAll(".t.current, .t.same").forEach((node) => node.classList.remove("current", "same", "pinned"));
  if (!current) return;
  cards[current.row.index].lanes.forEach((lane, view) => {
    const node = lane.querySelector(`[data-i="${current.i}"]`);
    if (node) node.classList.add(...(view === current.view ? ["current", ...(pinned ? ["pinned"] : [])] : ["same"]));
  });
}
function alternatives(title, kind, opinion, i, chosen) {
  const [ids, probabilities] = opinion.top[i], item = (id, p) => el("li", { class: id === chosen ? "taken" : undefined },
    el("span", { "aria-hidden": "true" }, id === chosen ? "▸" : ""),
    el("span", { class: "word", title: inWords(name(id)) }, inWords(name(id))),
    svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "back", width: 100, height: 10 }), svg("rect", { class: "bar", width: Math.max(0.5, 100 * p), height: 10 })),
    el("span", { class: "percent" }, percent(p)));
  const items = ids.map((id, n) => item(id, probabilities[n]));
  if (!ids.length) return null; // a teacher with another tokenizer, inside a span
  if (chosen !== null && !ids.includes(chosen)) items.push(item(chosen, opinion.logp[i] === null ? 0 : Math.exp(opinion.logp[i])));
  return el("section", { class: kind }, el("h3", {}, title), el("ol", {}, ...items));
}
function show(row, view, i, speak) {
  current = { row, view, i };
  const chosen = row.ids[i], { teacher } = row, written = `“${inWords(row.shown[i])}”`;
  const facts = [], add = (what, value) => facts.push(el("dt", {}, what), el("dd", {}, value));
  row.views.forEach((v, n) => {
    const whose = two ? `${letters[n]}: ` : "";
    add(`${whose}KL(student ‖ teacher)`, `${nats(v.kl[i])} nats`);
    add(`${whose}KL(teacher ‖ student)`, `${nats(v.fkl[i])} nats`);
  });
  row.views.forEach((v, n) => add(`log-probability, ${letters[n]}`, nats(v.logp[i])));
  add("log-probability, teacher", nats(teacher.logp[i]));
  add("position, id", `${i + 1}, ${chosen}`);
  const span = spanOf(row, i);
  if (span) {
    add("span, student's tokens", spelled(span.student));
    add("span, teacher's tokens", spelled(span.teacher));
    add("its cost", `${span.exact ? "exact" : "partly sampled"}${span.charged ? "; charged for another spelling" : ""}`);
  }
  const lists = row.views.map((v, n) => alternatives(two ? `Student ${letters[n]}` : "Student's top 5", classes[n], v, i, chosen));
  lists.splice(1, 0, alternatives(two ? "Teacher" : "Teacher's top 5", "teacher", teacher, i, texts ? null : chosen));
  $("panel-token").textContent = written;
  $("panel-body").replaceChildren(el("div", { class: "tops" }, ...lists.filter((list) => list !== null)), el("dl", {}, ...facts),
    el("p", { class: "hint" }, `▸ the token that was written · completion ${row.index + 1}${pinned ? " · pinned, Esc lets go" : " · Enter or tap pins"}`));
  const p = (x) => (x === null ? "n/a" : percent(Math.exp(x)));
  const sentence = `${written}: KL ${nats(row.views[view].kl[i])}. ${letters.map((l, n) => `${two ? l : "Student"} ${p(row.views[n].logp[i])}`).join(", ")}, `
    + `teacher ${p(teacher.logp[i])}.`
    + (teacher.top[i][0].length ? ` Teacher’s first choice “${inWords(name(teacher.top[i][0][0]))}” ${percent(teacher.top[i][1][0])}.` : "")
    + (span ? ` Span ${spelled(span.student)}, in the teacher’s tokens ${spelled(span.teacher)}.` : "");
  $("said").setAttribute("aria-live", speak ? "polite" : "off"); // pointing would chatter
  $("said").textContent = sentence;
  $("panel").classList.add("open");
  $("panel").classList.toggle("pinned", pinned);
  $("close").hidden = false;
  document.body.classList.add("sheet");
  outline();
}
function close() {
  pinned = false;
  current = null;
  $("panel").classList.remove("open", "pinned");
  document.body.classList.remove("sheet");
  $("panel-token").textContent = "No token yet";
  $("said").textContent = "";
  $("panel-body").replaceChildren(el("p", { class: "hint" }, "Point at a token, tap it, or press Tab and then the arrow keys."));
  $("close").hidden = true;
  outline();
}
const place = (node) => ({ row: node.closest("article").row, view: Number(node.parentNode.dataset.view), i: Number(node.dataset.i) });
const selected = (node, speak) => { const at = place(node); show(at.row, at.view, at.i, speak); };
function pin(node) {
  const at = place(node), again = pinned && current && current.row === at.row && current.view === at.view && current.i === at.i;
  pinned = !again;
  selected(node, true);
  const sheet = $("panel").getBoundingClientRect(), box = node.getBoundingClientRect();
  if (getComputedStyle($("panel")).position === "fixed" && box.bottom > sheet.top - 12) window.scrollBy(0, box.bottom - sheet.top + 48);
}

// -- pointer and keys ------------------------------------------------------------------------------------------
const tokenOf = (target) => (target instanceof Element ? target.closest("#list .t") : null);
function listen() {
  const list = $("list");
  list.addEventListener("pointerover", (event) => {
    const node = event.pointerType === "mouse" ? tokenOf(event.target) : null;
    if (node && !pinned) selected(node, false);
  });
  list.addEventListener("click", (event) => { const node = tokenOf(event.target); if (node) pin(node); });
  list.addEventListener("focusin", (event) => {
    const lane = event.target.closest(".tokens");
    if (!lane) return;
    fill(lane.closest("article"));
    if (event.target === lane) {
      if (lane.matches(":focus-visible")) (lane.querySelector(`[data-i="${lane.dataset.last}"]`) || lane.querySelector(".t"))?.focus();
      return;
    }
    lane.tabIndex = -1; // Shift+Tab leaves the card instead of coming back here
    lane.dataset.last = event.target.dataset.i;
    if (event.target.matches(":focus-visible")) selected(event.target, true);
  });
  list.addEventListener("focusout", (event) => {
    const lane = event.target.closest(".tokens");
    if (lane && !lane.contains(event.relatedTarget)) lane.tabIndex = 0;
  });
  list.addEventListener("keydown", (event) => {
    const node = tokenOf(event.target), move = node && !event.ctrlKey && !event.metaKey && !event.altKey && MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    const next = move(node, [...node.parentNode.querySelectorAll(".t")]);
    if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "nearest" }); uncover(next); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("help").open && (event.target !== $("search") || !$("search").value)) return close();
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") { event.preventDefault(); $("search").focus(); $("search").select(); }
    if (event.key === "?") $("help").showModal();
  });
  $("help-button").addEventListener("click", () => $("help").showModal());
  $("close").addEventListener("click", () => { const at = current; close(); if (at) focusToken(at); });
}
function uncover(node) { // of the sheet that covers the lower half of a phone
  const panel = $("panel"), gap = node.getBoundingClientRect().bottom - panel.getBoundingClientRect().top + 24;
  if (getComputedStyle(panel).position === "fixed" && gap > 0) window.scrollBy(0, gap);
}
function focusToken(at) {
  const node = cards[at.row.index].lanes[at.view].querySelector(`[data-i="${at.i}"]`);
  if (node) node.focus({ preventScroll: true });
}
const beside = (step) => (node, all) => all[all.indexOf(node) + step];
const line = (down) => (node, all) => {
  const at = node.getClientRects()[0], boxes = all.map((other) => [other, other.getClientRects()[0]]);
  const beyond = boxes.filter(([, box]) => (down ? box.top > at.top + 6 : box.top < at.top - 6));
  if (!beyond.length) return null;
  const top = down ? Math.min(...beyond.map(([, box]) => box.top)) : Math.max(...beyond.map(([, box]) => box.top));
  const off = (box) => Math.abs(box.left + box.width / 2 - at.left - at.width / 2);
  return beyond.filter(([, box]) => Math.abs(box.top - top) < 6).reduce((a, b) => (off(b[1]) < off(a[1]) ? b : a))[0];
};
const marked = (step) => (node, all) => { // in this card, else in the next one that has any
  const here = all.filter((_, i) => (all.indexOf(node) - i) * step < 0 && all[i].classList.contains("marked"));
  if (here.length) return step > 0 ? here[0] : here[here.length - 1];
  const view = Number(node.parentNode.dataset.view), next = step > 0 ? "nextElementSibling" : "previousElementSibling";
  for (let card = node.closest("article")[next]; card; card = card[next]) {
    if (card.hidden || !card.row.ids.some((_, i) => isMarked(card.row, view, i))) continue;
    fill(card);
    const found = card.lanes[view].querySelectorAll(".marked");
    return found[step > 0 ? 0 : found.length - 1];
  }
  return null;
};
const pinHere = (node) => { pin(node); return null; };
const MOVES = { ArrowRight: beside(1), ArrowLeft: beside(-1), ArrowDown: line(true), ArrowUp: line(false), n: marked(1),
  p: marked(-1), Home: (_, all) => all[0], End: (_, all) => all[all.length - 1], Enter: pinHere, " ": pinHere };

function controls() {
  for (const [value, [title]] of Object.entries(SORTS)) $("sort").append(el("option", { value }, title));
  const usual = Math.min(highest, Math.max(0.01, every[Math.floor(0.95 * every.length)] || 0));
  $("threshold").value = Math.round(1000 * Math.log(usual / LEAST) / Math.log(highest / LEAST));
  const limit = () => { state.limit = ofSlider(Number($("threshold").value)); $("threshold").setAttribute("aria-valuetext", `${nats(state.limit)} nats`); };
  limit();
  let waiting = 0;
  const soon = (change) => () => { change(); cancelAnimationFrame(waiting); waiting = requestAnimationFrame(apply); };
  $("threshold").addEventListener("input", soon(limit));
  $("search").addEventListener("input", soon(() => { state.query = $("search").value.toLowerCase(); search(); }));
  $("show").addEventListener("change", soon(() => { state.only = $("show").value === "worst"; }));
  $("numbers").addEventListener("change", () => $("list").classList.toggle("numbers", $("numbers").checked));
  $("sort").addEventListener("change", sort);
}
drawHead();
drawCurve();
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; drawCurve(); } });
controls();
search();
sort();
apply();
listen();
cards.forEach((card) => observer.observe(card));
document.documentElement.dataset.ready = "true"; // for those who drive a browser
