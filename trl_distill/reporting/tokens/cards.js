// Second part: the cards. Tokens are drawn when their card comes near the window; until then it holds its plain text, which
// the browser's own search finds. Search, sort and filter.
// -- cards -----------------------------------------------------------------------------------------------------
const near = new Set();
const cards = rows.map((row) => {
  const facts = el("p", { class: "facts" });
  const fact = (what, value) => facts.append(el("span", {}, `${what} `, el("b", {}, value)));
  if (row.reward !== null) fact("reward", points(row.reward));
  const several = Object.entries(row.rewards);
  if (several.length > 1) several.forEach(([what, value]) => fact(what, points(value)));
  row.means.forEach((kl, i) => fact(two ? `KL ${letters[i]}` : "mean KL", nats(kl)));
  if (!two) fact("worst token", nats(row.max));
  facts.append(el("span", {}, count(row.ids.length, "token")));
  if (row.truncated) facts.append(el("b", {}, "cut at the limit"));
  const prompt = el("div", { class: "prompt", tabindex: row.prompt.length > 400 ? 0 : undefined }, row.prompt);
  const asked = row.pictures.length ? el("div", { class: "asked" }, pictures(row), prompt) : prompt;
  const lanes = row.views.map((_, view) => el("div", { class: "tokens", tabindex: 0, role: "group", "data-view": view,
    "aria-label": `Tokens of completion ${row.index + 1}${two ? `, judged for ${letters[view]}` : ""}; arrow keys move` }, row.text));
  const boxes = lanes.map((lane, i) => el("div", { class: "lane" },
    two ? el("h4", { class: classes[i] }, `${letters[i]}: ${data.students[i]}`) : null, lane));
  const card = el("article", { "aria-labelledby": `row-${row.index}` }, el("h3", { id: `row-${row.index}` }, `Completion ${row.index + 1}`),
    facts, asked, el("div", { class: `lanes${two ? " two" : ""}` }, ...boxes));
  card.style.containIntrinsicSize = `auto ${150 + 30 * Math.ceil(row.text.length / 70) + (row.pictures.length ? 120 : 0)}px`;
  Object.assign(card, { row, lanes, prompt, stale: true });
  return card;
});
function pictures(row) { // the images of its prompt: thumbnails, and the names of those that are not shown
  const drawn = row.pictures.filter((one) => one[3] !== null), others = row.pictures.filter((one) => one[3] === null);
  return el("div", { class: "pictures" },
    ...drawn.map(([alt, width, height, number]) => el("img", { src: data.pictures[number], alt, title: alt, width, height })),
    ...others.map(([alt]) => el("span", {}, alt)));
}
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { near.add(target); fill(target); } else near.delete(target);
  }
}, { rootMargin: "600px" });

function fill(card) {
  if (!card.stale) return;
  card.stale = false;
  const { row } = card, kept = row.ids.map((_, i) => !state.only || [...Array(2 * CONTEXT + 1).keys()].some((step) => {
    const j = i + step - CONTEXT;
    return j >= 0 && j < row.ids.length && anyMarked(row, j);
  }));
  card.lanes.forEach((lane, view) => {
    const active = lane.contains(document.activeElement) ? Number(document.activeElement.dataset.i) : null, nodes = [];
    for (let i = 0, hidden = 0; i <= row.ids.length; i++) {
      if (i < row.ids.length && !kept[i]) { hidden++; continue; }
      if (hidden) nodes.push(el("span", { class: "gap" }, ` … ${hidden} … `));
      hidden = 0;
      if (i < row.ids.length) nodes.push(token(row, view, i));
    }
    lane.replaceChildren(...nodes);
    if (active !== null) (lane.querySelector(`[data-i="${active}"]`) || lane).focus({ preventScroll: true });
  });
  card.prompt.replaceChildren(...highlighted(row.prompt, row.lowerPrompt));
  if (current && current.row === row) outline();
}
function token(row, view, i) {
  const kl = row.views[view].kl[i], marked = isMarked(row, view, i), span = spanOf(row, i);
  const node = el("span", { role: "button", tabindex: -1, "data-i": i, "data-kl": short(kl),
    class: `t k${level(kl)}${marked ? " marked" : ""}${row.hits.has(i) ? " hit" : ""}${span && !span.exact ? " sampled" : ""}`,
    "aria-label": `${inWords(row.shown[i])}, KL ${nats(kl)}${marked ? ", marked" : ""}` });
  drawText(node, row.shown[i]);
  return node;
}
function highlighted(text, lower) {
  const parts = [];
  let from = 0;
  for (let at; state.query && (at = lower.indexOf(state.query, from)) >= 0; from = at + state.query.length) {
    parts.push(text.slice(from, at), el("mark", {}, text.slice(at, at + state.query.length)));
  }
  return [...parts, text.slice(from)];
}
function redraw() {
  cards.forEach((card) => { card.stale = true; });
  near.forEach(fill);
}

// -- search, sort, filter --------------------------------------------------------------------------------------
function search() {
  const { query } = state;
  for (const row of rows) {
    row.hits = new Set();
    for (let at = query ? row.lower.indexOf(query) : -1; at >= 0; at = row.lower.indexOf(query, at + query.length)) {
      row.starts.forEach((start, i) => { if (start < at + query.length && start + row.texts[i].length > at) row.hits.add(i); });
    }
    row.found = !query || row.hits.size > 0 || row.lowerPrompt.includes(query);
  }
}
function apply() {
  let visible = 0, marked = 0;
  for (const card of cards) {
    const { row } = card, of = row.ids.filter((_, i) => anyMarked(row, i)).length;
    card.hidden = !row.found || (state.only && !of);
    if (!card.hidden) { visible++; marked += of; }
  }
  $("limit").value = `${nats(state.limit)} nats`;
  const all = cards.filter((card) => !card.hidden).reduce((sum, card) => sum + card.row.ids.length, 0);
  $("shown").textContent = visible ? `${visible} of ${count(rows.length, "completion")} shown; ${marked.toLocaleString("en")} of ${count(all, "token")} marked.`
    : "No completion fits. Clear the search, or mark more tokens.";
  redraw();
}
function sort() {
  const [, order] = SORTS[$("sort").value];
  $("list").append(...[...cards].sort((a, b) => order(a.row, b.row) || a.row.index - b.row.index));
}
const LEAST = 0.001;
const ofSlider = (value) => LEAST * (highest / LEAST) ** (value / 1000);
