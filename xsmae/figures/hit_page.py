"""The page of the map of hits: HTML and JavaScript, without a library.

All text comes from the data and is set as text, never as HTML.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title>xsmae search</title>
<style>
* { box-sizing: border-box; }
body { margin: 0; display: flex; height: 100vh; font: 13px sans-serif; color: #222; }
#map { flex: 1; min-width: 0; background: #f4f4f1; cursor: grab; touch-action: none; }
#list { width: 320px; overflow-y: auto; border-left: 1px solid #ccc; }
.hit { display: flex; gap: 8px; padding: 8px; border-bottom: 1px solid #e4e4e4; }
.hit.on { background: #fff3d6; }
.hit.here { cursor: pointer; }
.hit img, .hit .none { width: 96px; height: 96px; flex: none; object-fit: contain; }
.hit .none { background: #d9d9d9; font-size: 10px; padding: 4px; overflow: hidden; }
.hit div { overflow-wrap: anywhere; min-width: 0; }
.hit b { font-size: 14px; }
.foot { fill-opacity: .3; stroke-width: 2; vector-effect: non-scaling-stroke; }
.foot, .dot { cursor: pointer; }
.foot.on { fill-opacity: .55; stroke-width: 4; }
.dot { stroke: #fff; stroke-width: 1; vector-effect: non-scaling-stroke; }
.line { stroke: #c9c9c4; stroke-width: 1; vector-effect: non-scaling-stroke; }
text { font: 11px sans-serif; fill: #444; }
</style>
</head>
<body>
<svg id="map" xmlns="http://www.w3.org/2000/svg"></svg>
<div id="list"><noscript>The map needs JavaScript.</noscript></div>
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const map = document.getElementById("map"), list = document.getElementById("list");
const SVG = "http://www.w3.org/2000/svg", METRES = 111195;  // of a degree
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98],
                 [253, 231, 37]];
const hits = data.hits, placed = hits.filter(h => h.centre);
const scores = hits.map(h => h.score);
const low = Math.min(...scores), high = Math.max(...scores);
const turn = x => x < data.turn ? x + 360 : x;
const middle = placed.reduce((sum, h) => sum + h.centre[1], 0) / (placed.length || 1);
const narrow = Math.max(Math.cos(middle * Math.PI / 180), 0.01);
const project = (x, y) => [x * narrow, -y];

function colour(score) {
  const t = (high > low ? (score - low) / (high - low) : 1) * (COLOURS.length - 1);
  const i = Math.min(Math.floor(t), COLOURS.length - 2);
  const mix = COLOURS[i].map((c, j) => c + (t - i) * (COLOURS[i + 1][j] - c));
  return `rgb(${mix.map(Math.round)})`;
}
function add(parent, name, fields, text) {
  const made = document.createElementNS(SVG, name);
  for (const key in fields) made.setAttribute(key, fields[key]);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}
function element(parent, name, text, kind) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (kind) made.className = kind;
  parent.appendChild(made);
  return made;
}

// The view: what is at the middle, and degrees of latitude per pixel.
let view;
const world = add(map, "g", {}), lines = add(world, "g", {});
const shapes = add(world, "g", {}), fixed = add(map, "g", {});
const drawn = new Map();

function ringOf(ring) {
  const centre = ring.reduce((sum, p) => sum + p[0], 0) / ring.length;
  const shift = turn(centre) - centre;
  return ring.map(p => project(p[0] + shift, p[1]));
}
function whole() {
  const points = placed.flatMap(h => h.rings.flatMap(r => ringOf(r)));
  if (!points.length) return {x: 0, y: 0, step: 0.5};
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const box = map.getBoundingClientRect();
  const step = Math.max((x1 - x0) / box.width, (y1 - y0) / box.height, 1e-9) * 1.2;
  return {x: (x0 + x1) / 2, y: (y0 + y1) / 2, step: step};
}
function nice(limit) {
  const power = 10 ** Math.floor(Math.log10(limit));
  return power * [5, 2, 1].find(d => d * power <= limit);
}
function longitude(x) { return ((x + 180) % 360 + 360) % 360 - 180; }
function degrees(value, step, letters) {
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const letter = Math.abs(value) < step / 2 ? "" : letters[value < 0 ? 1 : 0];
  return Math.abs(value).toFixed(digits) + "\\u00b0" + letter;
}
function draw() {
  const box = map.getBoundingClientRect(), s = 1 / view.step;
  const left = box.width / 2 - view.x * s, top = box.height / 2 - view.y * s;
  world.setAttribute("transform", `translate(${left} ${top}) scale(${s})`);
  lines.replaceChildren();
  fixed.replaceChildren();
  // Meridians and parallels, about 130 pixels from each other.
  const step = nice(150 * view.step / narrow);
  const x0 = -left / s / narrow, x1 = (box.width - left) / s / narrow;
  const y0 = (top - box.height) / s, y1 = top / s;
  for (let i = Math.ceil(x0 / step); i * step <= x1; i++) {
    const x = i * step * narrow;
    add(lines, "line", {class: "line", x1: x, x2: x, y1: -y0, y2: -y1});
    const text = degrees(longitude(i * step), step, "EW");
    add(fixed, "text", {x: x * s + left + 3, y: 12}, text);
  }
  const down = nice(150 * view.step);
  for (let i = Math.ceil(Math.max(y0, -90) / down); i * down <= Math.min(y1, 90); i++) {
    const y = -i * down;
    const ends = {x1: x0 * narrow, x2: x1 * narrow, y1: y, y2: y};
    add(lines, "line", {class: "line", ...ends});
    const at = y * s + top - 3;
    if (at > box.height - 45) continue;  // the scale bar is there
    add(fixed, "text", {x: 4, y: at}, degrees(i * down, down, "NS"));
  }
  for (const dot of shapes.querySelectorAll(".dot")) dot.setAttribute("r", 4 / s);
  // The scale bar is right at the latitude of the middle.
  const length = nice(140 * view.step * METRES), pixels = length / METRES * s;
  const bottom = box.height - 20;
  add(fixed, "rect", {x: 10, y: bottom, width: pixels, height: 5, fill: "#222"});
  const told = length >= 1000 ? length / 1000 + " km"
    : +length.toPrecision(3) + " m";
  add(fixed, "text", {x: 10, y: bottom - 5}, told);
  for (let i = 0; i < 40; i++) {
    const at = low + (high - low) * i / 39;
    const x = box.width - 180 + 4 * i;
    add(fixed, "rect", {x: x, y: bottom, width: 4, height: 8, fill: colour(at)});
  }
  if (!hits.length) return;
  add(fixed, "text", {x: box.width - 180, y: bottom - 5}, low.toFixed(3));
  const right = {x: box.width - 20, y: bottom - 5, "text-anchor": "end"};
  add(fixed, "text", right, high.toFixed(3));
  const centre = {x: box.width - 100, y: bottom - 5, "text-anchor": "middle"};
  add(fixed, "text", centre, "cosine");
}
function mark(hit, scroll) {
  for (const [other, parts] of drawn) {
    for (const part of parts.all) part.classList.toggle("on", other === hit);
  }
  if (hit && scroll) drawn.get(hit).card.scrollIntoView({block: "nearest"});
}
// The best hit is drawn last, above the others.
for (const hit of [...hits].reverse()) {
  const parts = {all: []};
  drawn.set(hit, parts);
  if (!hit.centre) continue;
  const fill = colour(hit.score);
  for (const ring of hit.rings) {
    const points = ringOf(ring).map(p => p.join(",")).join(" ");
    const fields = {class: "foot", points: points, fill: fill, stroke: fill};
    parts.all.push(add(shapes, "polygon", fields));
  }
  const [x, y] = project(turn(hit.centre[0]), hit.centre[1]);
  parts.all.push(add(shapes, "circle", {class: "dot", cx: x, cy: y, fill: fill}));
  for (const part of parts.all) {
    const head = `${hit.rank}: ${hit.score.toFixed(4)}`;
    const facts = [head, hit.id, hit.date, hit.source];
    add(part, "title", {}, facts.filter(Boolean).join("\\n"));
    part.addEventListener("mouseenter", () => mark(hit, false));
    part.addEventListener("click", () => mark(hit, true));
  }
}
for (const hit of hits) {
  const card = element(list, "div", "", hit.centre ? "hit here" : "hit");
  const parts = drawn.get(hit);
  parts.card = card;
  parts.all.push(card);
  if (hit.image) {
    element(card, "img").src = hit.image;
  } else {
    element(card, "div", hit.reason, "none");
  }
  const facts = element(card, "div");
  element(facts, "b", `${hit.rank}   ${hit.score.toFixed(4)}`);
  element(facts, "div", hit.id);
  if (hit.date) element(facts, "div", hit.date);
  element(facts, "div", hit.source);
  const place = hit.centre
    ? `${hit.centre[1].toFixed(5)}, ${hit.centre[0].toFixed(5)}`
    : "no place on Earth";
  element(facts, "div", place);
  card.addEventListener("mouseenter", () => mark(hit, false));
  if (!hit.centre) continue;
  card.addEventListener("click", () => {
    const [x, y] = project(turn(hit.centre[0]), hit.centre[1]);
    view = {x: x, y: y, step: view.step};
    draw();
    mark(hit, false);
  });
}
map.addEventListener("wheel", event => {
  event.preventDefault();
  const box = map.getBoundingClientRect(), factor = 1.2 ** Math.sign(event.deltaY);
  const dx = event.clientX - box.left - box.width / 2;
  const dy = event.clientY - box.top - box.height / 2;
  const step = Math.min(Math.max(view.step * factor, 1e-9), 1);
  view.x += dx * (view.step - step);
  view.y += dy * (view.step - step);
  view.step = step;
  draw();
}, {passive: false});
let grabbed = null;
map.addEventListener("pointerdown", event => { grabbed = event; });
window.addEventListener("pointerup", () => { grabbed = null; });
window.addEventListener("pointermove", event => {
  if (!grabbed) return;
  view.x -= (event.clientX - grabbed.clientX) * view.step;
  view.y -= (event.clientY - grabbed.clientY) * view.step;
  grabbed = event;
  draw();
});
map.addEventListener("dblclick", () => { view = whole(); draw(); });
window.addEventListener("resize", draw);
view = whole();
draw();
</script>
</body>
</html>
"""
