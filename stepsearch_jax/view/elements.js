"use strict";
// Small helpers: elements with text only (never markup), colors, charts.

const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
  "#56b4e9", "#555555"]; // Okabe and Ito: told apart by everybody.
const DASHES = ["", "6 3", "2 2", "8 3 2 3"];

// element("td", {class: "number"}, "text", child, ...)
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect"].includes(name);
  const node = svg ?
    document.createElementNS("http://www.w3.org/2000/svg", name) :
    document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  for (const child of children) {
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}

function number(x, digits = 3) {
  if (typeof x !== "number") return x === null || x === undefined ? "" : x;
  return Number.isInteger(x) ? String(x) : x.toPrecision(digits);
}

// Blue for positive, orange for negative, white for 0.
function shade(x, largest) {
  if (!largest || !x) return "transparent";
  const strength = Math.min(Math.abs(x) / largest, 1) ** .6;
  const [r, g, b] = x > 0 ? [60, 140, 210] : [235, 140, 40];
  return `rgba(${r},${g},${b},${(.85 * strength).toFixed(3)})`;
}

function choice(label, options, value, changed) {
  const list = element("select", {
    onchange: (event) => changed(event.target.value)});
  for (const [key, text] of options) {
    const option = element("option", {value: key}, text);
    if (String(key) === String(value)) option.selected = true;
    list.append(option);
  }
  return element("label", {}, label + " ", list);
}

// One chart: lines = [{name, color, dash, points: [[x, y], ...]}].
function chart(title, lines) {
  const [width, height, left, bottom, top] = [420, 220, 52, 24, 8];
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) [y0, y1] = [y0 - .5, y1 + .5];
  const px = (x) => left + (width - left - 8) * (x - x0) / (x1 - x0 || 1);
  const py = (y) => height - bottom -
    (height - bottom - top) * (y - y0) / (y1 - y0);
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`,
    role: "img", "aria-label": `${title} over training steps`});
  for (const y of [y0, (y0 + y1) / 2, y1]) {
    svg.append(
      element("line", {x1: left, x2: width - 8, y1: py(y), y2: py(y),
        stroke: "#e3e7eb"}),
      element("text", {x: left - 4, y: py(y) + 4, "text-anchor": "end",
        "font-size": 11}, number(y)));
  }
  for (const x of [x0, x1]) {
    svg.append(element("text", {x: px(x), y: height - 6, "font-size": 11,
      "text-anchor": x === x0 ? "start" : "end"}, `step ${number(x)}`));
  }
  for (const line of lines) {
    svg.append(element("path", {fill: "none", stroke: line.color,
      "stroke-width": 2, "stroke-dasharray": line.dash,
      d: line.points.map(([x, y], i) =>
        `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("")}));
    if (line.points.length < 30) {
      for (const [x, y] of line.points) {
        svg.append(element("circle", {cx: px(x), cy: py(y), r: 2.5,
          fill: line.color}));
      }
    }
  }
  const note = element("div", {class: "soft", "aria-live": "polite"}, "\u00a0");
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    const near = lines.map((line) => {
      const best = line.points.reduce((a, b) =>
        Math.abs(px(a[0]) - at) <= Math.abs(px(b[0]) - at) ? a : b);
      return `${line.name} step ${best[0]}: ${number(best[1], 4)}`;
    });
    note.textContent = near.join("   ");
  });
  return element("figure", {}, element("figcaption", {}, title), svg, note);
}
