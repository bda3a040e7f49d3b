// Draws readings of memory into an element: a bar by component, a legend, and the time of each step.
import { addStyle } from "./style.js";

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const MOST_STEPS = 60;

// Okabe and Ito's palette: told apart with every kind of colour vision. The legend names each in words and numbers too.
const COLORS = {
  "diffusion model": "#0072b2",
  "text encoder": "#e69f00",
  VAE: "#009e73",
  "audio encoder": "#cc79a7",
  "model patch": "#56b4e9",
  scratch: "#f0e442",
  other: "#999999",
};

/** Bytes as people read them: "14.2 GiB", "312 MiB". */
export function formatBytes(bytes) {
  if (bytes >= 0.995 * GIB) return `${(bytes / GIB).toFixed(bytes < 10 * GIB ? 2 : 1)} GiB`;
  const mib = bytes / MIB;
  return `${mib.toFixed(mib < 10 ? 1 : 0)} MiB`;
}

/** Seconds with as many digits as a person can use. */
export function formatSeconds(seconds) {
  return seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(seconds < 100 ? 1 : 0);
}

function make(className, ...children) {
  const element = document.createElement("div");
  element.className = className;
  element.append(...children);
  return element;
}

/** One node's meter. `element` goes into the page, `height` is what it needs in pixels. */
export class MemoryMeterView {
  /** @param say gives a text in the user's language. */
  constructor(say) {
    addStyle();
    this.say = say;
    this.prompt = null;
    this.steps = [];
    this.phase = make("lowbit-phase");
    this.speed = make("lowbit-speed");
    this.bar = make("lowbit-bar");
    this.bar.setAttribute("role", "img");
    this.total = make("lowbit-total");
    this.times = make("lowbit-times");
    this.times.setAttribute("role", "img");
    this.legend = make("lowbit-legend");
    this.element = make(
      "lowbit-meter",
      make("lowbit-head", this.phase, this.speed),
      this.bar,
      this.total,
      this.legend,
      this.times,
    );
    this.height = 0;
  }

  /** Takes readings as the server sends them with "lowbit.memory", in bytes and seconds, and shows the last one. */
  update(readings) {
    readings.forEach((reading) => this.record(reading));
    const reading = readings.at(-1);
    const parts = Object.entries(reading.components ?? {}).filter(([, bytes]) => bytes > 0);
    this.drawHead(reading);
    this.drawBar(reading, parts);
    this.drawLegend(parts);
    this.drawTimes();
    // It only grows: a node that changes its height at every phase is hard to look at.
    this.height = Math.max(this.height, 84 + 16 * Math.ceil(parts.length / 2));
  }

  /** Keeps the time of a step; a new prompt starts anew. */
  record({ prompt_id: prompt, step, steps, seconds_per_step: seconds }) {
    if (prompt !== this.prompt) {
      this.prompt = prompt;
      this.steps = [];
    }
    if (steps > 0 && step > 0 && seconds > 0 && this.steps.at(-1)?.step !== step) this.steps.push({ step, seconds });
  }

  drawHead({ phase, step, steps, seconds_per_step: seconds }) {
    this.phase.textContent = steps > 0 ? `${this.say(phase)} ${step}/${steps}` : this.say(phase ?? "");
    this.speed.textContent = seconds > 0 ? `${formatSeconds(seconds)} ${this.say("s/step")}` : "";
  }

  drawBar(reading, parts) {
    const { limit_bytes: limit, reserved_bytes: reserved = 0, peak_bytes: peak = 0, free_bytes: free } = reading;
    const allocated = reading.allocated_bytes ?? parts.reduce((sum, [, bytes]) => sum + bytes, 0);
    const end = limit || (free ? reserved + free : Math.max(peak, reserved, allocated));
    const full = Math.max(end, reserved, peak, allocated, 1);
    const pieces = parts.map(([name, bytes]) => this.piece(this.say(name), bytes, full, COLORS[name] ?? COLORS.other));
    if (reserved > allocated) pieces.push(this.piece(this.say("held, unused"), reserved - allocated, full, null));
    this.bar.replaceChildren(...pieces);
    if (peak > 0) this.bar.append(this.mark("lowbit-peak", peak / full, `${this.say("peak")} ${formatBytes(peak)}`));
    if (limit && limit < full)
      this.bar.append(this.mark("lowbit-limit", limit / full, `${this.say("limit")} ${formatBytes(limit)}`));

    const whole = limit || free ? ` / ${formatBytes(end)}` : "";
    const top = peak > 0 ? ` · ${this.say("peak")} ${formatBytes(peak)}` : "";
    this.total.textContent = `${formatBytes(allocated)}${whole}${top}`;
    this.element.title = reading.device ?? "";
    const spoken = parts.map(([name, bytes]) => `${this.say(name)} ${formatBytes(bytes)}`).join(", ");
    this.bar.setAttribute("aria-label", `${this.total.textContent}: ${spoken}`);
  }

  piece(name, bytes, full, color) {
    const piece = make(color ? "lowbit-piece" : "lowbit-piece lowbit-unused");
    piece.style.width = `${(100 * bytes) / full}%`;
    if (color) piece.style.backgroundColor = color;
    piece.title = `${name} ${formatBytes(bytes)}`;
    return piece;
  }

  mark(className, position, title) {
    const mark = make(className);
    mark.style.left = `${100 * Math.min(1, position)}%`;
    mark.title = title;
    return mark;
  }

  drawLegend(parts) {
    const entries = parts.map(([name, bytes]) => {
      const swatch = make("lowbit-swatch");
      swatch.style.backgroundColor = COLORS[name] ?? COLORS.other;
      return make("lowbit-entry", swatch, make("lowbit-name", this.say(name)), make("lowbit-bytes", formatBytes(bytes)));
    });
    this.legend.replaceChildren(...entries);
  }

  drawTimes() {
    const shown = this.steps.slice(-MOST_STEPS);
    const slowest = Math.max(...shown.map((entry) => entry.seconds), 0);
    const columns = shown.map((entry) => {
      const column = make("lowbit-time");
      column.style.height = `${Math.max(6, (100 * entry.seconds) / slowest)}%`;
      column.title = `${this.say("step")} ${entry.step}: ${formatSeconds(entry.seconds)} s`;
      return column;
    });
    this.times.replaceChildren(...columns);
    this.times.setAttribute("aria-label", shown.map((entry) => `${formatSeconds(entry.seconds)} s`).join(", "));
  }
}
