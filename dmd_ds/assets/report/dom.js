// Small helpers: elements, and numbers as they are read.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; texts are never read as HTML. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  put(node, attributes);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}) {
  const node = document.createElementNS(SVG, name);
  put(node, attributes);
  return node;
}

function put(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "ink") node.style.setProperty("--ink", value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
}

const ink = (number) => `var(--c${number % 8})`;

/** Four digits that count, without trailing zeros. */
function written(value, percent = false) {
  if (value === null || value === undefined) return "not finite";
  const number = percent ? 100 * value : value;
  const size = Math.abs(number);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? number.toExponential(2) : String(Number(number.toPrecision(4)));
  return text.replace("-", "\u2212") + (percent ? " %" : "");
}

/** A section of the page with its title, which the navigation names. */
function section(title, note, ...children) {
  const id = title.toLowerCase().replaceAll(" ", "-");
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  const head = el("header", {}, el("h2", {}, title), ...(note ? [el("p", { class: "note" }, note)] : []));
  const node = el("section", { id }, head, ...children);
  document.getElementById("main").append(node);
  return node;
}
