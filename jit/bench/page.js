"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const row = data.rows[0], kernels = data.kernels.rows, roof = data.roofline;
const $ = (id) => document.getElementById(id);
const narrow = () => document.documentElement.clientWidth < 620;

function make(parent, tag, attributes = {}, text = null) {
  const svg = ["svg", "g", "rect", "circle", "line", "path", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                   : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}
const digits = (x, n = 3) => x === 0 ? "0" : String(Number(x.toPrecision(n)));
const scaled = (x, units, base = 1000) => {
  let k = 0;
  while (Math.abs(x) >= base && k < units.length - 1) { x /= base; k++; }
  return (Math.abs(x) >= 100 ? x.toFixed(0) : digits(x)) + " " + units[k];
};
const time = (s) => s === 0 ? "0" : s >= 1 ? digits(s) + " s" : scaled(s * 1e9, ["ns", "µs", "ms"]);
const flop = (x) => scaled(x, ["", "k", "M", "G", "T"]);
const bytes = (x) => scaled(x, ["B", "KiB", "MiB", "GiB"], 1024);
const percent = (x) => x === null ? "–" : (x * 100).toFixed(x < 0.1 ? 1 : 0) + " %";
const colour = (limit) => `var(--${limit.startsWith("host") ? "host" : limit.split(" ")[0].toLowerCase()})`;

/* One tooltip for everything: by hovering, or by tapping. */
const tip = $("tip");
function explain(node, text, chosen = null) {
  const show = (event) => {
    tip.textContent = text();
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), edge = document.documentElement;
    tip.style.left = Math.max(8, Math.min(event.clientX + 12, edge.clientWidth - box.width - 8)) + "px";
    const above = event.clientY - box.height - 12;
    tip.style.top = (above > 4 ? above : event.clientY + 16) + "px";
  };
  node.addEventListener("pointermove", show);
  node.addEventListener("click", (event) => { show(event); if (chosen) choose(chosen); event.stopPropagation(); });
  node.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") tip.hidden = true; });
}
document.addEventListener("click", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);

function facts(k) {
  const lines = [k.name, k.origin.join(", "), `${time(k.seconds)}, ${percent(k.share)} of the run`];
  if (k.flops) lines.push(`${flop(k.flops)}FLOP, ${digits(k.gflops)} GFLOP/s`);
  if (k.bytes) lines.push(`${bytes(k.bytes)}, ${digits(k.gbytes)} GB/s`);
  if (k.of_roof !== null) lines.push(`${percent(k.of_roof)} of the roofline`);
  lines.push(`limit: ${k.limit}`);
  return lines.filter(Boolean).join("\n");
}
function choose(k) {
  for (const node of document.querySelectorAll("[data-kernel]"))
    node.classList.toggle("chosen", Number(node.dataset.kernel) === kernels.indexOf(k));
}

/* Light and dark. */
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = dark.matches ? "dark" : "light";
const paint = () => document.documentElement.dataset.theme = theme;
paint();
$("theme").onclick = () => { theme = theme === "dark" ? "light" : "dark"; paint(); };
dark.addEventListener("change", () => { theme = dark.matches ? "dark" : "light"; paint(); });

/* Heading and cards. */
document.title = `${row.model} – onnxjit bench`;
$("title").textContent = row.model;
const shapes = Object.entries(data.sizes).map(([n, s]) => `${n} ${s.join("×") || "scalar"}`).join(", ");
$("subtitle").textContent = `${row.threads} thread${row.threads > 1 ? "s" : ""} · ${shapes} · ${data.machine.date.slice(0, 10)}`;
const card = (value, label, kind = "") => {
  const box = make($("cards"), "div", { class: "card" });
  make(box, "b", { class: kind }, value);
  make(box, "span", {}, label);
};
const own = row.engines.onnxjit;
if (row.fastest) {
  const ratio = row.ratios.fastest;
  card(ratio.toFixed(2) + "×", `the fastest peer, ${row.fastest}`, ratio >= 1 ? "good" : "bad");
}
card(time(own.minimum), "least time of a run");
const work = kernels.reduce((sum, k) => sum + k.flops, 0);
if (work) card(digits(work / own.minimum / 1e9) + " GFLOP/s", `of ${digits(peakOf("float32") / 1e9)} measured for float32`);
const least = kernels.reduce((sum, k) => sum + (k.of_roof === null ? k.seconds : Math.min(k.roof, k.seconds)), 0);
card(percent(least / data.kernels.seconds), "of the roofline, over all kernels");
card(String(kernels.length), "steps");

/* Engines. */
function engines() {
  const parent = $("engines"), all = Object.entries(row.engines);
  parent.replaceChildren();
  const width = parent.clientWidth || 900, left = narrow() ? 112 : 150, right = 118, step = 34;
  const longest = (t) => Math.max(t.minimum, Math.min(t.upper, 1.5 * t.median));
  // An engine many times slower than the others would leave nothing of them to see.
  const sorted = all.map(([, t]) => t.minimum).sort((a, b) => a - b);
  const most = Math.min(Math.max(...all.map(([, t]) => longest(t))), 4 * Math.max(own.minimum, sorted[1] ?? 0));
  const svg = make(parent, "svg", { viewBox: `0 0 ${width} ${all.length * step + 4}` });
  const x = (s) => left + (width - left - right) * Math.min(s / most, 1);
  all.sort((a, b) => a[1].minimum - b[1].minimum).forEach(([name, t], i) => {
    const y = i * step + 4, mine = name === "onnxjit";
    make(svg, "text", { x: 0, y: y + 17, "font-weight": mine ? 700 : 400 }, name);
    const bar = make(svg, "rect", { x: left, y, width: Math.max(1, x(t.minimum) - left), height: 24, rx: 3,
      fill: mine ? "var(--accent)" : "var(--overhead)", opacity: t.precision === "float32" ? 1 : 0.5 });
    if (t.minimum > most) make(svg, "text", { x: x(most) - 22, y: y + 17, style: "fill: var(--back)" }, "≫");
    else {
      make(svg, "line", { x1: x(t.lower), x2: x(t.upper), y1: y + 12, y2: y + 12, stroke: "var(--ink)" });
      make(svg, "line", { x1: x(t.median), x2: x(t.median), y1: y + 6, y2: y + 18, stroke: "var(--ink)", "stroke-width": 2 });
    }
    const end = Math.max(x(t.upper), x(t.minimum), x(t.median)) + 8;
    make(svg, "text", { x: end, y: y + 17 }, time(t.minimum) + (mine ? "" : `  (${t.ratio.toFixed(2)}×)`));
    explain(bar, () => `${name} ${t.version}\nleast ${time(t.minimum)}, median ${time(t.median)}\nquartiles ${time(t.lower)} – ${time(t.upper)}, ${t.runs} runs`);
  });
}
function engineTable() {
  const head = make(make($("engine-table"), "thead"), "tr");
  ["engine", "version", "least", "median", "quartiles", "runs", "ratio", "difference", "ready after", ""]
    .forEach((name, i) => make(head, "th", { class: i < 2 || i === 9 ? "text" : "" }, name));
  const body = make($("engine-table"), "tbody");
  for (const [name, t] of Object.entries(row.engines)) {
    const line = make(body, "tr"), mine = name === "onnxjit";
    [name, t.version, time(t.minimum), time(t.median), `${time(t.lower)} – ${time(t.upper)}`, t.runs,
     mine ? "" : t.ratio.toFixed(2), mine ? "" : t.difference.toExponential(1), time(t.load),
     [t.note, t.precision === "float32" ? "" : `in ${t.precision}`].filter(Boolean).join(", ")]
      .forEach((text, i) => make(line, "td", { class: i < 2 || i === 9 ? "text" : "" }, text));
  }
  for (const [name, why] of Object.entries(row.failures))
    make(make($("failures"), "li", { class: "bad" }), "span", {}, `${name}: ${why}`);
  for (const v of data.verdicts)
    make(make($("failures"), "li", { class: v.holds ? "good" : "bad" }), "span", {}, v.text);
}

/* What limits the run. */
function limits() {
  const stack = make($("limits"), "div", { class: "stack" });
  for (const [limit, share] of Object.entries(data.kernels.limits)) {
    const part = make(stack, "div", { style: `flex: ${share} 0 0; background: ${colour(limit)}` });
    const count = kernels.filter((k) => k.limit === limit).length;
    explain(part, () => `${limit}: ${percent(share)} of the run, ${count} steps`);
    const entry = make($("legend"), "span");
    make(entry, "span", { class: "dot", style: `background: ${colour(limit)}` });
    entry.append(`${limit} ${percent(share)}`);
  }
}

function peakOf(dtype) {
  const found = Object.entries(roof.peaks).filter(([name]) => name.startsWith(dtype + "/"));
  return Math.max(...found.map(([, value]) => value));
}

/* Roofline, both axes logarithmic. */
function roofline() {
  const parent = $("roofline");
  parent.replaceChildren();
  const shown = kernels.filter((k) => k.intensity && k.gflops);
  const width = parent.clientWidth || 900, height = narrow() ? 360 : 460;
  const left = 52, right = narrow() ? 22 : 150, top = 30, bottom = 42;
  const dtypes = [...new Set(shown.map((k) => k.dtype))];
  const peaks = Object.entries(roof.peaks).filter(([name]) => dtypes.includes(name.split("/")[0]) || name.startsWith("float32/"));
  // What lies far outside has its work miscounted (windows or tables that are read in part only);
  // it stands at the edge.
  const high = Math.max(...peaks.map(([, v]) => v / 1e9)) * 2.5;
  const low = Math.max(high / 1e4, Math.min(high / 100, ...shown.map((k) => k.gflops / 2)));
  const lows = shown.map((k) => k.intensity), small = Math.max(0.02, Math.min(0.1, ...lows) / 1.5);
  const large = 1000;
  const lx = Math.log(large / small), ly = Math.log(high / low);
  const x = (v) => left + (width - left - right) * Math.log(v / small) / lx;
  const y = (v) => height - bottom - (height - top - bottom) * Math.log(v / low) / ly;
  const svg = make(parent, "svg", { viewBox: `0 0 ${width} ${height}` });
  const decades = (from, to) => { const found = []; for (let e = Math.ceil(Math.log10(from)); 10 ** e <= to; e++) found.push(10 ** e); return found; };
  for (const v of decades(small, large)) {
    make(svg, "line", { x1: x(v), x2: x(v), y1: top, y2: height - bottom, class: "grid" });
    make(svg, "text", { x: x(v), y: height - bottom + 16, "text-anchor": "middle", class: "soft" }, digits(v));
  }
  for (const v of decades(low, high)) {
    make(svg, "line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "grid" });
    make(svg, "text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "soft" }, digits(v));
  }
  make(svg, "text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, "FLOP per byte");
  make(svg, "text", { x: 6, y: 16 }, "GFLOP/s");
  const best = Math.max(...peaks.map(([, v]) => v)) / 1e9;
  let lastLabel = -1e9;
  const labels = [];
  peaks.sort((a, b) => b[1] - a[1]).forEach(([name, value], i) => {
    const v = value / 1e9;
    make(svg, "line", { x1: x(Math.max(small, v / (roof.bandwidths[0].read / 1e9))), x2: width - right, y1: y(v), y2: y(v), class: i ? "roof dash" : "roof" });
    if (y(v) - lastLabel < 14) return;
    lastLabel = y(v);
    labels.push([narrow() ? { x: width - right - 4, y: y(v) - 4, "text-anchor": "end" } : { x: width - right + 6, y: y(v) + 4 }, `${name} ${digits(v)}`]);
  });
  roof.bandwidths.forEach((b, i) => {
    const rate = Math.max(b.read, b.copy) / 1e9, from = Math.max(small, low / rate), to = Math.min(large, best / rate);
    make(svg, "line", { x1: x(from), y1: y(rate * from), x2: x(to), y2: y(rate * to), class: "roof", style: `stroke: ${colour(b.level)}` });
    const at = from * Math.pow(to / from, (i % 2 ? 0.5 : 0.04));
    const angle = -Math.atan2(y(rate * at) - y(rate * at * 2), x(at * 2) - x(at)) * 180 / Math.PI;
    make(svg, "text", { x: x(at), y: y(rate * at) - 5, transform: `rotate(${angle} ${x(at)} ${y(rate * at)})`, class: "label", style: `fill: ${colour(b.level)}` }, `${b.level} ${digits(rate)} GB/s`);
  });
  [...shown].sort((a, b) => b.share - a.share).forEach((k) => {
    const r = Math.max(3.5, Math.sqrt(k.share) * (narrow() ? 26 : 36));
    const dot = make(svg, "circle", { cx: x(Math.min(Math.max(k.intensity, small), large)), cy: y(Math.min(Math.max(k.gflops, low), high)), r, fill: colour(k.limit), "fill-opacity": 0.55,
      stroke: colour(k.limit), class: "mark", "data-kernel": kernels.indexOf(k) });
    explain(dot, () => facts(k), k);
  });
  for (const [place, text] of labels) make(svg, "text", { ...place, class: "soft label" }, text);
}

/* Timeline. */
const view = { from: 0, to: 0 };
const total = Math.max(data.kernels.run, 1e-9);
function timeline() {
  const parent = $("timeline");
  parent.replaceChildren();
  const lanes = Math.max(1, ...kernels.map((k) => k.busy.length)), lane = 44;
  const width = parent.clientWidth || 900, left = 66, top = 10, height = top + lanes * lane + 30;
  const svg = make(parent, "svg", { viewBox: `0 0 ${width} ${height}` });
  const x = (s) => left + (width - left - 8) * (s - view.from) / (view.to - view.from);
  let tick = 10 ** Math.floor(Math.log10((view.to - view.from) / 3));
  for (const more of [2, 2.5, 2]) if ((view.to - view.from) / tick > (narrow() ? 4 : 10)) tick *= more;
  for (let i = Math.ceil(view.from / tick); i * tick <= view.to; i++) {
    const at = x(i * tick);
    make(svg, "line", { x1: at, x2: at, y1: top, y2: height - 22, class: "grid" });
    make(svg, "text", { x: at, y: height - 7, "text-anchor": "middle", class: "soft" }, i ? time(i * tick) : "0");
  }
  const clip = make(svg, "g");
  for (let n = 0; n < lanes; n++)
    make(svg, "text", { x: 4, y: top + n * lane + lane / 2 + 2, class: "soft" }, n ? `worker ${n}` : "caller");
  for (const k of kernels) {
    if (k.start > view.to || k.start + k.wall < view.from) continue;
    k.busy.forEach((seconds, n) => {
      if (seconds <= 0) return;
      const from = Math.max(left, x(k.start)), to = Math.min(width - 8, x(k.start + seconds));
      if (to < left || from > width - 8) return;
      const y = top + n * lane + 4, wide = Math.max(0.6, to - from);
      const bar = make(clip, "rect", { x: from, y, width: wide, height: lane - 12, fill: colour(k.limit), rx: wide > 6 ? 2 : 0,
        stroke: "var(--back)", "stroke-width": wide > 4 ? 0.8 : 0, class: "mark", "data-kernel": kernels.indexOf(k) });
      explain(bar, () => facts(k) + `\nthis thread: ${time(seconds)} of ${time(k.wall)}`, k);
      const fits = Math.floor((wide - 8) / 7);
      if (fits >= 4) make(clip, "text", { x: from + 4, y: y + 21, style: "pointer-events: none; fill: var(--back)" },
        k.name.length > fits ? k.name.slice(0, fits - 1) + "…" : k.name);
    });
  }
  $("span").textContent = `${time(view.from)} – ${time(view.to)} of ${time(total)}`;
}
function look(from, to) {
  const wide = Math.min(Math.max(to - from, total / 5000), total);
  view.from = Math.min(Math.max(0, from), total - wide);
  view.to = view.from + wide;
  timeline();
}
function zoom(factor, middle = (view.from + view.to) / 2) {
  const wide = (view.to - view.from) / factor;
  look(middle - (middle - view.from) / factor, middle - (middle - view.from) / factor + wide);
}
for (const button of document.querySelectorAll("[data-zoom]"))
  button.onclick = () => Number(button.dataset.zoom) ? zoom(Number(button.dataset.zoom)) : look(0, total);
const at = (event) => {
  const box = $("timeline").getBoundingClientRect();
  return view.from + (view.to - view.from) * (event.clientX - box.left - 66) / (box.width - 74);
};
$("timeline").addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, at(event));
}, { passive: false });
const fingers = new Map();
$("timeline").addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, event.clientX); });
for (const name of ["pointerup", "pointercancel", "pointerleave"])
  $("timeline").addEventListener(name, (event) => { fingers.delete(event.pointerId); });
$("timeline").addEventListener("pointermove", (event) => {
  if (!fingers.has(event.pointerId)) return;
  const before = [...fingers.values()];
  const second = (view.to - view.from) / ($("timeline").clientWidth - 74);
  const moved = (event.clientX - fingers.get(event.pointerId)) * second;
  fingers.set(event.pointerId, event.clientX);
  const now = [...fingers.values()];
  if (now.length === 2) {
    const spread = Math.abs(now[0] - now[1]) / Math.max(8, Math.abs(before[0] - before[1]));
    zoom(spread, at({ clientX: (now[0] + now[1]) / 2 }));
  } else look(view.from - moved, view.to - moved);
});

/* The table of kernels. */
const columns = [
  ["kernel", (k) => k.name, (k) => k.name, "text"],
  ["time", (k) => k.seconds, (k) => time(k.seconds), ""],
  ["share", (k) => k.share, (k) => percent(k.share), ""],
  ["% of roof", (k) => k.of_roof ?? -1, (k) => percent(k.of_roof), ""],
  ["limit", (k) => k.limit, (k) => k.limit, "text"],
  ["GFLOP/s", (k) => k.gflops, (k) => k.flops ? digits(k.gflops) : "–", ""],
  ["GB/s", (k) => k.gbytes, (k) => k.bytes ? digits(k.gbytes) : "–", ""],
  ["FLOP/B", (k) => k.intensity ?? -1, (k) => k.intensity === null ? "–" : digits(k.intensity), ""],
  ["FLOP", (k) => k.flops, (k) => k.flops ? flop(k.flops) : "–", ""],
  ["bytes", (k) => k.bytes, (k) => k.bytes ? bytes(k.bytes) : "–", ""],
  ["dtype", (k) => k.dtype, (k) => k.dtype, "text"],
  ["rule", (k) => k.rule, (k) => k.rule, "text"],
  ["nodes", (k) => k.origin.join(", "), (k) => k.origin.join(", "), "text nodes"],
];
let order = { column: 1, falling: true };
function table() {
  const wanted = $("filter").value.toLowerCase();
  const found = kernels.filter((k) => [k.name, k.rule, k.limit, k.dtype, ...k.origin].join(" ").toLowerCase().includes(wanted));
  const key = columns[order.column][1];
  found.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (order.falling ? -1 : 1));
  const share = found.reduce((sum, k) => sum + k.share, 0);
  $("count").textContent = `${found.length} of ${kernels.length} steps, ${percent(share)} of the run`;
  $("kernels").replaceChildren();
  const head = make(make($("kernels"), "thead"), "tr");
  columns.forEach(([name, , , kind], i) => {
    const mark = order.column === i ? (order.falling ? " ▾" : " ▴") : "";
    const cell = make(head, "th", { class: kind, "aria-sort": order.column === i ? (order.falling ? "descending" : "ascending") : "none" });
    make(cell, "button", { type: "button" }, name + mark).onclick = () => {
      order = { column: i, falling: order.column === i ? !order.falling : kind === "" };
      table();
    };
  });
  const body = make($("kernels"), "tbody");
  const most = Math.max(...kernels.map((k) => k.share), 1e-9);
  for (const k of found) {
    const line = make(body, "tr", { "data-kernel": kernels.indexOf(k) });
    line.onclick = () => choose(k);
    columns.forEach(([name, , text, kind]) => {
      const cell = make(line, "td", { class: kind });
      if (name === "share") make(cell, "span", { class: "bar", style: `width: ${(46 * k.share / most).toFixed(1)}px` });
      if (name === "limit") make(cell, "span", { class: "dot", style: `background: ${colour(k.limit)}` });
      cell.append(text(k));
      if (name === "nodes") cell.title = text(k);
    });
  }
}
$("filter").oninput = table;

/* The machine. */
function machine() {
  const head = make(make($("machine"), "thead"), "tr"), body = make($("machine"), "tbody");
  ["measured", "value"].forEach((name, i) => make(head, "th", { class: i ? "" : "text" }, name));
  const add = (name, value) => { const line = make(body, "tr"); make(line, "td", { class: "text" }, name); make(line, "td", {}, value); };
  for (const [name, value] of Object.entries(roof.peaks)) add(`multiply-adds ${name}`, `${digits(value / 1e9)} G${name.startsWith("int") ? "OP" : "FLOP"}/s`);
  for (const b of roof.bandwidths) add(`${b.level} bandwidth (${bytes(b.footprint)})`, `read ${digits(b.read / 1e9)}, copy ${digits(b.copy / 1e9)} GB/s`);
  add("clock of one busy thread", `${digits(roof.frequency / 1e9)} GHz`);
  for (const line of data.about) make($("about"), "li", {}, line);
  make($("about"), "li", {}, `roofline measured ${roof.date}, ${roof.threads} thread(s)`);
}

engineTable(); limits(); table(); machine();
function draw() { engines(); roofline(); timeline(); }
view.to = total;
draw();
let width = document.documentElement.clientWidth;
addEventListener("resize", () => {
  if (document.documentElement.clientWidth !== width) { width = document.documentElement.clientWidth; draw(); }
});
