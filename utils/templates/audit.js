"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const PER_PAGE = data.perPage, TICKS = ["keep", "fix", "drop"];
const name = i => data.rows[i][data.columns.indexOf("img")];
const store = "label-audit-" + data.key;
let ticks = load(), shown = [], page = 0, zoomed = 0;

function load() {
  try {
    const saved = Object.entries(JSON.parse(localStorage.getItem(store) || "{}"));
    return new Map(saved.filter(entry => TICKS.includes(entry[1])));
  } catch { return new Map(); }
}

function save() {
  try { localStorage.setItem(store, JSON.stringify(Object.fromEntries(ticks))); }
  catch { by("tally").title = "this browser does not keep the ticks: save decisions.csv before you leave"; }
}

function make(tag, attributes = {}, ...content) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...content);
  return element;
}

// ---- which rows, in which order

function choose() {
  const text = by("text").value.trim().toLowerCase(), score = data.scores[by("score").value];
  const low = by("low").value === "" ? -Infinity : +by("low").value;
  const high = by("high").value === "" ? Infinity : +by("high").value;
  const fits = i => {
    const tick = ticks.get(name(i)) || "none";
    return (!text || (data.rows[i].join("\n") + "\n" + data.reasons[i]).toLowerCase().includes(text))
      && (!by("verdict").value || data.verdicts[i] === by("verdict").value)
      && (!by("tick").value || tick === by("tick").value)
      && (!by("noisy").value || String(data.noisy[i]) === by("noisy").value)
      && ((low === -Infinity && high === Infinity) || (score[i] !== null && score[i] >= low && score[i] <= high));
  };
  shown = data.rows.map((_, i) => i).filter(fits);
  const values = data.scores[by("sort").value], way = by("down").checked ? -1 : 1;
  if (values) {
    const last = v => v === null;
    shown.sort((a, b) => last(values[a]) - last(values[b]) || way * (values[a] - values[b]) || a - b);
  } else if (way < 0) shown.reverse();
  page = 0;
  draw();
}

function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  const first = page * PER_PAGE, rows = shown.slice(first, first + PER_PAGE);
  by("cards").replaceChildren(...rows.map((i, k) => card(i, first + k)));
  by("shown").textContent = shown.length === data.rows.length ? `${shown.length} images`
    : `${shown.length} of ${data.rows.length} images`;
  for (const label of document.querySelectorAll(".page")) label.textContent = `page ${page + 1} of ${pages}`;
  for (const button of document.querySelectorAll(".previous")) button.disabled = page === 0;
  for (const button of document.querySelectorAll(".next")) button.disabled = page === pages - 1;
  tally();
}

// ---- one image

function scoreText(i) {
  return data.scoreNames.filter(score => data.scores[score][i] !== null)
    .map(score => `${score}\u00a0${data.scores[score][i].toFixed(data.scores[score][i] < 0.1 ? 3 : 2)}`).join("  ");
}

function panels(i) {
  const [width, height] = data.sizes[i];
  return data.panels.map((what, n) => {
    const image = make("img", {src: `thumbs/${i + 1}.webp`, alt: `${what} of ${name(i)}`, loading: "lazy"});
    const panel = make("span", {className: "panel", title: what}, image);
    panel.style.aspectRatio = `${width} / ${height}`;
    image.style.setProperty("--n", n);
    return panel;
  });
}

function card(i, place) {
  const tick = ticks.get(name(i)) || "";
  const noise = data.noisy ? (data.noisy[i] ? " \u00b7 known noise" : " \u00b7 known clean") : "";
  const box = make("article", {className: `card ${tick}`},
    make("h2", {}, `${i + 1}. ${name(i)}`),
    make("p", {}, make("span", {className: `verdict ${data.verdicts[i]}`}, data.verdicts[i]),
      ` \u00b7 ${data.reasons[i]}${noise}`, make("br"), make("span", {className: "soft"}, scoreText(i))));
  if (i in data.sizes) {
    const button = make("button", {type: "button", className: "panels"}, ...panels(i));
    button.setAttribute("aria-label", `enlarge ${name(i)}: ${data.panels.join(", ")}`);
    button.style.setProperty("--shape", data.sizes[i][0] / data.sizes[i][1]);
    button.addEventListener("click", () => zoom(place));
    box.append(button);
  } else box.append(make("p", {className: "soft"}, "not pictured (--show)"));
  box.append(choices(i, box));
  return box;
}

function choices(i, box) {
  const set = make("fieldset", {className: "choices"}, make("legend", {className: "hidden"}, `tick for ${name(i)}`));
  for (const tick of ["", ...TICKS]) {
    const radio = make("input", {type: "radio", name: `tick${i}`, value: tick, checked: tick === (ticks.get(name(i)) || "")});
    radio.addEventListener("change", () => {
      if (tick) ticks.set(name(i), tick); else ticks.delete(name(i));
      box.className = `card ${tick}`;
      save();
      tally();
    });
    set.append(make("label", {}, radio, tick || "no tick"));
  }
  return set;
}

function zoom(place) {
  if (place < 0 || place >= shown.length || !(shown[place] in data.sizes)) return;
  const i = shown[zoomed = place];
  by("zoomTitle").textContent = `${i + 1}. ${name(i)}`;
  by("zoomText").textContent = `${data.verdicts[i]}: ${data.reasons[i]}. ${scoreText(i)}`;
  by("zoomPanels").replaceChildren(...panels(i));
  by("zoomPanels").style.setProperty("--shape", data.sizes[i][0] / data.sizes[i][1]);
  if (!by("zoom").open) by("zoom").showModal();
}

// ---- what leaves the page

function csv(rows) {
  const cell = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  return rows.map(row => row.map(value => cell(String(value))).join(",") + "\n").join("");
}

const inList = () => data.rows.map((_, i) => i).sort((a, b) => data.order[a] - data.order[b]);
const leaves = i => ["drop", "fix"].includes(ticks.get(name(i)));

function keptCsv() {
  return csv([data.columns, ...inList().filter(i => !leaves(i)).map(i => data.rows[i])]);
}

function decisionsCsv() {
  const own = ["img", "filename"].map(column => data.columns.indexOf(column));
  const rows = inList().filter(i => ticks.has(name(i)))
    .map(i => [...own.map(at => data.rows[i][at]), ticks.get(name(i)), data.verdicts[i], data.reasons[i], i + 1]);
  return csv([["img", "filename", "decision", "suggested", "reason", "rank"], ...rows]);
}

function download(file, text) {
  const link = make("a", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: file});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function tally() {
  const count = Object.fromEntries(TICKS.map(tick => [tick, 0]));
  let left = 0;
  data.rows.forEach((_, i) => {
    if (ticks.has(name(i))) count[ticks.get(name(i))] += 1;
    if (!leaves(i)) left += 1;
  });
  by("tally").textContent = `stay: ${left} of ${data.rows.length} \u00b7 `
    + TICKS.map(tick => `${count[tick]} ${tick}`).join(", ");
  by("kept").disabled = left === 0;
}

// ---- controls

for (const verdict of data.verdictNames) by("verdict").append(make("option", {}, verdict));
by("sort").append(make("option", {value: "rank"}, "rank"));
for (const score of data.scoreNames) for (const id of ["score", "sort"]) by(id).append(make("option", {}, score));
if (!data.noisy) by("noisyLabel").style.display = "none";
for (const id of ["text", "low", "high"]) by(id).addEventListener("input", choose);
for (const id of ["verdict", "tick", "noisy", "score", "sort", "down"]) by(id).addEventListener("change", choose);
by("large").addEventListener("change", () => by("cards").classList.toggle("large", by("large").checked));
for (const [which, step] of [[".previous", -1], [".next", 1]])
  for (const button of document.querySelectorAll(which))
    button.addEventListener("click", () => { page += step; draw(); by("shown").scrollIntoView(); });
by("kept").addEventListener("click", () => download("kept.csv", keptCsv()));
by("decisions").addEventListener("click", () => download("decisions.csv", decisionsCsv()));
by("suggest").addEventListener("click", () => {
  const rows = shown.filter(i => !ticks.has(name(i)) && ["drop", "fix"].includes(data.verdicts[i]));
  if (!rows.length) return alert("Nothing to tick: no image shown here has a suggestion to fix or drop without a tick.");
  if (!confirm(`Tick drop or fix, as suggested, for ${rows.length} images? Suggestions can be wrong.`)) return;
  for (const i of rows) ticks.set(name(i), data.verdicts[i]);
  save();
  draw();
});
by("clear").addEventListener("click", () => {
  if (!ticks.size || !confirm(`Forget all ${ticks.size} ticks?`)) return;
  ticks.clear();
  save();
  draw();
});
by("zoomClose").addEventListener("click", () => by("zoom").close());
by("zoomPrevious").addEventListener("click", () => zoom(zoomed - 1));
by("zoomNext").addEventListener("click", () => zoom(zoomed + 1));
by("zoom").addEventListener("click", event => { if (event.target === by("zoom")) by("zoom").close(); });
by("zoom").addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") zoom(zoomed - 1);
  if (event.key === "ArrowRight") zoom(zoomed + 1);
});
const wide = matchMedia("(min-width: 34rem)").matches;
for (const part of document.querySelectorAll(".fold")) part.open = wide;  // a phone shows the pictures first
choose();
