// What the parts of the page share: colours of the theme, numbers as the page writes them, one tooltip.

function theme(root) {
  const style = getComputedStyle(root);
  const value = name => style.getPropertyValue(name).trim();
  const names = ["ink", "muted", "paper", "rule", "faint", "after", "bad"];
  const found = Object.fromEntries(names.map(name => [name, value(`--${name}`)]));
  found.palette = Array.from({ length: 8 }, (_, index) => value(`--c${index}`));
  found.font = style.fontFamily;
  return found;
}

// Three significant digits, thousands separated.
function number(value) {
  if (!value) return "0";
  const rounded = Math.abs(value) < 1000 ? Number(value.toPrecision(3)) : value;
  const decimals = Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(Math.abs(rounded)))));
  return rounded.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

function scaled(value, base, units) {
  let power = 0;
  while (Math.abs(value) >= base * 0.9995 && power < units.length - 1) {
    value /= base;
    power += 1;
  }
  return `${number(value)} ${units[power]}`;
}

const shown = {
  time: ms => (ms < 1 ? scaled(ms * 1e6, 1e3, ["ns", "µs", "ms"]) : scaled(ms, 1e3, ["ms", "s"])),
  flops: value => scaled(value, 1e3, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]),
  memory: value => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]),
  share: value => `${(100 * value).toFixed(1)}%`,
};

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function tooltip(root) {
  const box = element("div", "tip");
  box.hidden = true;
  root.append(box);
  return {
    show(event, title, lines) {
      box.replaceChildren(element("b", "", title), ...lines.filter(Boolean).map(line => element("span", "", line)));
      box.hidden = false;
      const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
      const below = event.clientY + 18;
      const top = below + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 12 : below;
      box.style.left = `${Math.max(8, left)}px`;
      box.style.top = `${Math.max(8, top)}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

// Calls `draw` now, and whenever the width of the target or the theme changes.
function redrawn(target, draw) {
  let width = -1;
  const drawn = () => {
    if (!target.clientWidth || target.clientWidth === width) return;
    width = target.clientWidth;
    draw();
  };
  drawn();
  // In a frame of its own: drawing changes heights, which the observer must not see while it reports.
  new ResizeObserver(() => requestAnimationFrame(drawn)).observe(target);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
