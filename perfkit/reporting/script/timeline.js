// The timeline of one profiled step: tracks of nested spans, zoomed and moved by wheel, pointer and keys.

function timeline(root, data, tip) {
  const holder = root.querySelector(".timeline");
  const spans = data.spans;
  if (!holder || !spans || !spans.start.length) return;
  const ROW = 19, HEAD = 20, AXIS = 22, GAP = 8;
  const strip = holder.querySelector(".strip"), main = holder.querySelector(".spans");
  const found = holder.querySelector(".found"), field = holder.querySelector("input");
  const rows = laidOut(), bands = banded(rows);
  const height = bands.length ? bands[bands.length - 1].bottom + GAP : 0;
  const first = Math.min(0, spans.start[0]);
  const last = spans.start.reduce((most, start, index) => Math.max(most, start + spans.length[index]), first) || 1;
  let view = { from: first, to: last }, hovered = -1, matches = null, colours;

  // The rows of each track, with their spans in order.
  function laidOut() {
    const made = spans.tracks.map(() => []);
    spans.start.forEach((_, index) => {
      const track = made[spans.track[index]], row = spans.row[index];
      while (track.length <= row) track.push([]);
      track[row].push(index);
    });
    return made.map(track => track.filter(row => row.length));
  }

  function banded(tracks) {
    let top = AXIS;
    return tracks.map((lines, index) => {
      const band = { name: spans.tracks[index], top, lines, bottom: top + HEAD + lines.length * ROW };
      top = band.bottom + GAP;
      return band;
    });
  }

  function prepared(canvas, tall) {
    const ratio = devicePixelRatio || 1, wide = holder.clientWidth;
    canvas.style.height = `${tall}px`;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, wide, tall);
    return pen;
  }

  const plain = kind => kind === "phase" || kind === "wait";
  const across = ms => ((ms - view.from) / (view.to - view.from)) * holder.clientWidth;
  const at = x => view.from + (x / holder.clientWidth) * (view.to - view.from);

  function draw() {
    colours = theme(root);
    drawSpans();
    drawStrip();
  }

  function drawSpans() {
    const pen = prepared(main, height), wide = holder.clientWidth;
    axis(pen, wide);
    pen.textBaseline = "middle";
    for (const band of bands) {
      pen.font = `600 11px ${colours.font}`;
      pen.fillStyle = colours.muted;
      pen.globalAlpha = 1;
      pen.fillText(band.name, 0, band.top + HEAD / 2);
      band.lines.forEach((line, index) => drawLine(pen, line, band.top + HEAD + index * ROW, wide));
    }
    pen.globalAlpha = 1;
  }

  function drawLine(pen, line, y, wide) {
    pen.font = `11px ${colours.font}`;
    let drawn = -1;
    for (let place = firstVisible(line); place < line.length; place++) {
      const index = line[place];
      if (spans.start[index] > view.to) break;
      const left = Math.max(across(spans.start[index]), -2);
      const right = Math.min(across(spans.start[index] + spans.length[index]), wide + 2);
      // What lies within one pixel is drawn once.
      if (right < drawn + 0.6) continue;
      drawn = right;
      drawSpan(pen, index, left, y, Math.max(right - left - 0.5, 0.7));
    }
  }

  function drawSpan(pen, index, left, y, wide) {
    const kind = spans.kinds[spans.kind[index]], dim = matches && !matches.has(index);
        pen.globalAlpha = dim ? 0.08 : { phase: 0.16, module: 0.3, wait: 0.3 }[kind] || 0.62;
    pen.fillStyle = plain(kind) ? colours.muted : colours.palette[spans.colour[index]];
    pen.fillRect(left, y, wide, ROW - 2);
    if (index === hovered) {
      pen.globalAlpha = 1;
      pen.strokeStyle = colours.ink;
      pen.strokeRect(left + 0.5, y + 0.5, Math.max(wide - 1, 1), ROW - 3);
    }
    if (wide > 28 && !dim) {
      pen.globalAlpha = 1;
      pen.fillStyle = colours.ink;
      pen.fillText(fitted(pen, spans.names[spans.name[index]], wide - 8), Math.max(left, 0) + 4, y + ROW / 2 - 0.5);
    }
  }

  function fitted(pen, text, wide) {
    if (pen.measureText(text).width <= wide) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (pen.measureText(`${text.slice(0, middle)}…`).width <= wide) low = middle;
      else high = middle - 1;
    }
    return low > 1 ? `${text.slice(0, low)}…` : "";
  }

  // The first span of a row that ends after the left edge: spans of a row do not overlap, so their ends are in order.
  function firstVisible(line) {
    let low = 0, high = line.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans.start[line[middle]] + spans.length[line[middle]] < view.from) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function axis(pen, wide) {
    const step = roundStep((view.to - view.from) / Math.max(2, wide / 110));
    pen.font = `11px ${colours.font}`;
    pen.textBaseline = "alphabetic";
    for (let tick = Math.ceil(view.from / step) * step; tick <= view.to; tick += step) {
      const x = Math.round(across(tick)) + 0.5;
      pen.strokeStyle = colours.rule;
      pen.beginPath();
      pen.moveTo(x, AXIS - 6);
      pen.lineTo(x, height);
      pen.stroke();
      pen.fillStyle = colours.muted;
      pen.textAlign = x < 20 ? "left" : x > wide - 20 ? "right" : "center";
      pen.fillText(Math.abs(tick) < step / 2 ? "0" : tickText(tick, step), x, 11);
    }
    pen.textAlign = "left";
  }

  function roundStep(rough) {
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].find(digit => digit * power >= rough) * power;
  }

  // As many digits as tell one tick from the next, in the unit of the step.
  function tickText(tick, step) {
    const [size, unit] = step >= 1e3 ? [1e3, "s"] : step >= 1e-2 ? [1, "ms"] : step >= 1e-5 ? [1e-3, "µs"] : [1e-6, "ns"];
    const decimals = Math.max(0, -Math.floor(Math.log10(step / size) + 1e-9));
    return `${(tick / size).toFixed(decimals)} ${unit}`;
  }

  // The whole step in small, with a window on what is shown.
  function drawStrip() {
    const tall = 34, pen = prepared(strip, tall), wide = holder.clientWidth;
    const place = ms => ((ms - first) / (last - first)) * wide;
    pen.fillStyle = colours.faint;
    pen.fillRect(0, 0, wide, tall);
    const high = (tall - 6) / bands.length;
    bands.forEach((band, index) => {
      for (const line of band.lines) {
        for (const span of line) {
          const kind = spans.kinds[spans.kind[span]], left = place(spans.start[span]);
          if (kind === "phase" || kind === "module") continue;
          pen.globalAlpha = 0.75;
          pen.fillStyle = plain(kind) ? colours.rule : colours.palette[spans.colour[span]];
          const wide = place(spans.start[span] + spans.length[span]) - left;
          pen.fillRect(left, 3 + index * high, Math.max(wide, 0.5), Math.max(high - 1, 1));
        }
      }
    });
    pen.globalAlpha = 0.8;
    pen.fillStyle = colours.paper;
    const left = place(view.from), right = place(view.to);
    pen.fillRect(0, 0, left, tall);
    pen.fillRect(right, 0, wide - right, tall);
    pen.globalAlpha = 1;
    pen.strokeStyle = colours.muted;
    pen.strokeRect(Math.max(left, 0) + 0.5, 0.5, Math.max(Math.min(right, wide) - left - 1, 3), tall - 1);
  }

  function look(from, to) {
    const smallest = (last - first) / 1e5, length = Math.min(Math.max(to - from, smallest), last - first);
    from = Math.min(Math.max(from, first), last - length);
    view = { from, to: from + length };
    draw();
  }

  function zoom(factor, around = (view.from + view.to) / 2) {
    look(around - (around - view.from) * factor, around + (view.to - around) * factor);
  }

  function hit(event) {
    const box = main.getBoundingClientRect(), ms = at(event.clientX - box.left), y = event.clientY - box.top;
    const slack = (2 * (view.to - view.from)) / holder.clientWidth;
    for (const band of bands) {
      const line = band.lines[Math.floor((y - band.top - HEAD) / ROW)];
      if (y < band.top + HEAD || y >= band.bottom || !line) continue;
      for (let place = firstVisible(line); place < line.length && spans.start[line[place]] <= ms + slack; place++) {
        const end = spans.start[line[place]] + spans.length[line[place]];
        if (end + slack >= ms && spans.start[line[place]] - slack <= ms) return line[place];
      }
    }
    return -1;
  }

  function hover(event) {
    const index = hit(event);
    if (index !== hovered) {
      hovered = index;
      drawSpans();
    }
    if (index < 0) return tip.hide();
    const module = spans.modules[spans.module[index]], length = spans.length[index];
    tip.show(event, spans.names[spans.name[index]], [
      module && module !== spans.names[spans.name[index]] ? `in ${module}` : "",
      `${shown.time(length)}, ${shown.share(length / (last - first))} of what is drawn`,
      `starts at ${shown.time(spans.start[index])} · ${spans.tracks[spans.track[index]]} · ${spans.kinds[spans.kind[index]]}`,
    ]);
  }

  function wheel(event) {
    const zooms = event.ctrlKey || event.metaKey || document.activeElement === main;
    if (!zooms && !event.shiftKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways) {
      const by = ((event.deltaX || event.deltaY) / holder.clientWidth) * (view.to - view.from);
      look(view.from + by, view.to + by);
    } else {
      zoom(Math.exp(event.deltaY * 0.002), at(event.clientX - main.getBoundingClientRect().left));
    }
  }

  // One pointer moves, two stretch.
  const pointers = new Map();
  function press(event) {
    pointers.set(event.pointerId, event.clientX);
    main.setPointerCapture(event.pointerId);
    main.focus({ preventScroll: true });
  }
  function move(event) {
    if (!pointers.has(event.pointerId)) return hover(event);
    const before = [...pointers.values()];
    pointers.set(event.pointerId, event.clientX);
    const after = [...pointers.values()];
    if (after.length === 1) {
      const by = ((before[0] - after[0]) / holder.clientWidth) * (view.to - view.from);
      if (by) look(view.from + by, view.to + by);
    } else {
      const spread = pair => Math.max(Math.abs(pair[1] - pair[0]), 8);
      zoom(spread(before) / spread(after), at((after[0] + after[1]) / 2 - main.getBoundingClientRect().left));
    }
  }
  function release(event) {
    pointers.delete(event.pointerId);
  }

  function keys(event) {
    const by = 0.15 * (view.to - view.from);
    const done = {
      ArrowLeft: () => look(view.from - by, view.to - by),
      ArrowRight: () => look(view.from + by, view.to + by),
      "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1.7), 0: () => look(first, last),
    }[event.key];
    if (done && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      done();
    }
  }

  function search() {
    const wanted = field.value.trim().toLowerCase();
    const holds = table => new Set(table.flatMap((text, index) => (text.toLowerCase().includes(wanted) ? [index] : [])));
    const names = holds(spans.names), modules = holds(spans.modules);
    const all = spans.start.flatMap((_, index) =>
      names.has(spans.name[index]) || modules.has(spans.module[index]) ? [index] : []);
    matches = wanted ? new Set(all) : null;
    found.textContent = wanted ? `${all.length.toLocaleString("en-US")} found` : "";
    drawSpans();
  }

  function slide(event) {
    if (!(event.buttons & 1)) return;
    const box = strip.getBoundingClientRect(), length = view.to - view.from;
    const middle = first + ((event.clientX - box.left) / box.width) * (last - first);
    look(middle - length / 2, middle + length / 2);
  }

  main.addEventListener("wheel", wheel, { passive: false });
  main.addEventListener("pointerdown", press);
  main.addEventListener("pointermove", move);
  main.addEventListener("pointerup", release);
  main.addEventListener("pointercancel", release);
  main.addEventListener("pointerleave", () => { hovered = -1; tip.hide(); drawSpans(); });
  main.addEventListener("dblclick", event => {
    const index = hit(event), room = index < 0 ? 0 : 0.05 * spans.length[index];
    if (index < 0) look(first, last);
    else look(spans.start[index] - room, spans.start[index] + spans.length[index] + room);
  });
  main.addEventListener("keydown", keys);
  strip.addEventListener("pointerdown", slide);
  strip.addEventListener("pointermove", slide);
  field.addEventListener("input", search);
  holder.querySelector(".in").addEventListener("click", () => zoom(0.5));
  holder.querySelector(".out").addEventListener("click", () => zoom(2));
  holder.querySelector(".all").addEventListener("click", () => look(first, last));
  redrawn(holder, draw);
}
