// Renders a reply's Markdown. The text becomes text nodes inside elements that this module creates, so HTML in a reply is
// shown as text. Images become links: the page requests nothing that a reply names.
//
// A hostile text must not make the page slow: nesting has a limit, and each search that fails is not repeated.

import { copy, element, iconButton } from "./dom.js";

const MAX_DEPTH = 8; // of quotes and lists, and of inline marks; deeper ones are shown as plain text
const MAX_INLINE = 20_000; // characters of one paragraph whose inline marks are read
const MAX_COLUMNS = 64;
// No two neighbouring parts of a pattern match the same character: a line of many spaces would otherwise take a time that
// grows with the square of its length.
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]([^]*)$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ *(?:\| *)?:?-+:? *(?:\| *:?-+:? *)*(?:\| *)?$/;

/** The blocks of a text inside an element. `update` replaces only the blocks that changed, which in a stream is the last
 * one, so that the work of a token does not grow with the reply and a selected text stays selected. */
export class MarkdownView {
  #container;
  #shown = []; // {source, block, node} for each block

  constructor(container) {
    this.#container = container;
  }

  update(text) {
    const blocks = parseBlocks(text.split("\n"), 0);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.#shown[same]?.source) same++;
    if (same === blocks.length - 1 && this.#extendCode(blocks[same], this.#shown[same])) same++;
    for (const { node } of this.#shown.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = renderBlock(block);
      this.#container.append(node);
      this.#shown.push({ source: block.source, block, node });
    }
  }

  /** Appends to a code block that has only grown. A new block for each token would cost more and more. */
  #extendCode(block, shown) {
    if (block.kind !== "code" || shown?.block.kind !== "code" || block.language !== shown.block.language) return false;
    if (!block.text.startsWith(shown.block.text)) return false;
    shown.node.querySelector("code").append(block.text.slice(shown.block.text.length));
    Object.assign(shown, { source: block.source, block });
    return true;
  }
}

// Blocks ---------------------------------------------------------------------------------------------------------------

/** Returns the blocks of a list of lines. Each has `kind`, `source` (its lines as text) and what its kind needs. */
export function parseBlocks(lines, depth) {
  const blocks = [];
  let start = 0;
  while (start < lines.length) {
    if (!lines[start].trim()) {
      start++;
      continue;
    }
    const [end, block] = readBlock(lines, start, depth);
    blocks.push({ ...block, source: `${block.kind}\n${lines.slice(start, end).join("\n")}` });
    start = end;
  }
  return blocks;
}

function readBlock(lines, start, depth) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  if (fence) return readCode(lines, start, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    return [start + 1, { kind: "heading", level: heading[1].length, text: withoutClosingMarks(heading[2]) }];
  }
  if (RULE.test(line)) return [start + 1, { kind: "rule" }];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, start, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, start, depth);
  if (isTable(lines, start)) return readTable(lines, start);
  return readParagraph(lines, start, depth);
}

function withoutClosingMarks(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end--;
  return end === 0 || trimmed[end - 1] === " " ? trimmed.slice(0, end).trimEnd() : trimmed;
}

function readCode(lines, start, fence) {
  const mark = fence[1];
  let end = start + 1;
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  while (end < lines.length && !closes(lines[end])) end++;
  const block = { kind: "code", language: fence[2].trim().split(/\s/)[0], text: lines.slice(start + 1, end).join("\n") };
  return [Math.min(end + 1, lines.length), block];
}

function readQuote(lines, start, depth) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return [end, { kind: "quote", blocks: parseBlocks(inner, depth + 1) }];
}

function readList(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = start;
  while (end < lines.length) {
    const mark = ITEM.exec(lines[end]);
    if (!mark || mark[1].length > first[1].length + 1 || /\d/.test(mark[2]) !== ordered || RULE.test(lines[end])) break;
    const indent = mark[0].length;
    const item = [lines[end].slice(indent)];
    end++;
    while (end < lines.length && continuesItem(lines, end, first[1].length)) {
      item.push(lines[end].slice(Math.min(indent, Math.max(0, lines[end].search(/\S|$/)))));
      end++;
    }
    items.push(parseBlocks(item, depth + 1));
    while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end++;
  }
  return [end, { kind: "list", ordered, first: ordered ? Number.parseInt(first[2], 10) : 1, items }];
}

/** Returns whether a line belongs to the list item before it: it is indented, or goes on with its paragraph. */
function continuesItem(lines, number, indent) {
  const line = lines[number];
  if (!line.trim()) {
    const next = lines[number + 1];
    return next !== undefined && Boolean(next.trim()) && next.search(/\S/) > indent + 1;
  }
  if (line.search(/\S/) > indent + 1) return true;
  return Boolean(lines[number - 1].trim()) && !startsBlock(line);
}

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

const isTable = (lines, start) =>
  lines[start].includes("|") && (lines[start + 1] ?? "").includes("-") && lines[start + 1].includes("|") &&
  TABLE_RULE.test(lines[start + 1]);

function readTable(lines, start) {
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const alignments = cellsOf(lines[start + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left");
  return [end, { kind: "table", alignments, head: cellsOf(lines[start]), rows: lines.slice(start + 2, end).map(cellsOf) }];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/, MAX_COLUMNS).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, start, depth) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !(depth < MAX_DEPTH && startsBlock(lines[end]))) {
    if (isTable(lines, end)) break;
    end++;
  }
  return [end, { kind: "paragraph", text: lines.slice(start, end).map((line) => line.trim()).join("\n") }];
}

const BLOCKS = {
  // The page has headings of its own above those of a reply.
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, {}, renderInline(text)),
  rule: () => element("hr"),
  code: ({ language, text }) => codeBlock(text, language),
  quote: ({ blocks }) => element("blockquote", {}, blocks.map(renderBlock)),
  list: ({ ordered, first, items }) =>
    element(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {}, items.map(renderItem)),
  table: renderTable,
  paragraph: ({ text }) => element("p", {}, renderInline(text)),
};

const renderBlock = (block) => BLOCKS[block.kind](block);

/** A list item whose only text is one paragraph needs no <p>. */
function renderItem(blocks) {
  const [first, ...rest] = blocks;
  const head = first?.kind === "paragraph" ? renderInline(first.text) : first ? [renderBlock(first)] : [];
  return element("li", {}, head, rest.map(renderBlock));
}

function renderTable({ alignments, head, rows }) {
  const cell = (tag) => (text, column) => element(tag, { class: alignments[column] ?? "left" }, renderInline(text));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    element("table", {},
      element("thead", {}, element("tr", {}, head.map(cell("th")))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell("td")))))));
}

/** Returns a block of code with its language and a button that copies it. */
export function codeBlock(text, language) {
  const code = element("code", {}, text);
  const button = iconButton("copy", "Copy code", () => copy(code.textContent, button), { text: "Copy" });
  return element("figure", { class: "code" },
    element("figcaption", {}, element("span", {}, language || "text"), button),
    element("pre", { tabindex: 0, role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, code));
}

// Inline marks ---------------------------------------------------------------------------------------------------------

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const LINK = /!?\[((?:[^[\]\\\n]|\\.){0,1000})\]\(<?([^\s<>()]{0,2000})>?(?: +"[^"\n]{0,500}")?\)/y;
const BRACKETED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"'`\])}*]{1,2000}/y;

/** Returns the nodes of a text with inline marks. */
export function renderInline(text, depth = 0) {
  if (text.length > MAX_INLINE || depth > MAX_DEPTH) return [text];
  const nodes = [];
  const unclosed = new Set(); // marks that no later text closes
  let plain = 0;
  let position = 0;
  while (position < text.length) {
    SPECIAL.lastIndex = position;
    const found = SPECIAL.exec(text);
    if (!found) break;
    position = found.index;
    const read = readInline(text, position, depth, unclosed);
    if (read === null) {
      position++;
      continue;
    }
    if (position > plain) nodes.push(text.slice(plain, position));
    nodes.push(read.node);
    position = plain = read.end;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

/** Returns the node that begins at a position and the position after it, or null if the character stands for itself. */
function readInline(text, at, depth, unclosed) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), end: at + 1 };
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return readCodeSpan(text, at, unclosed);
    case "[":
    case "!":
      return readLink(text, at, depth);
    case "<":
      return match(BRACKETED, text, at, (found) => link(found[1], [found[1]]));
    case "h":
      return readBareLink(text, at);
    default:
      return readMark(text, at, depth, unclosed);
  }
}

function match(pattern, text, at, render) {
  pattern.lastIndex = at;
  const found = pattern.exec(text);
  const node = found && render(found);
  return node ? { node, end: at + found[0].length } : null;
}

function readCodeSpan(text, at, unclosed) {
  let length = 1;
  while (text[at + length] === "`") length++;
  const mark = "`".repeat(length);
  if (unclosed.has(mark)) return { node: mark, end: at + length };
  let end = at + length;
  for (;;) {
    end = text.indexOf(mark, end);
    if (end < 0) {
      unclosed.add(mark);
      return { node: mark, end: at + length };
    }
    let after = end + length;
    while (text[after] === "`") after++;
    if (after === end + length) break;
    end = after;
  }
  const inner = text.slice(at + length, end).replaceAll("\n", " ");
  const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ");
  return { node: element("code", {}, padded ? inner.slice(1, -1) : inner), end: end + length };
}

function readLink(text, at, depth) {
  return match(LINK, text, at, (found) => {
    const image = found[0].startsWith("!");
    const label = image ? [`image: ${found[1] || found[2]}`] : renderInline(found[1], depth + 1);
    return link(found[2], label);
  });
}

function readBareLink(text, at) {
  if (/\w/.test(text[at - 1] ?? "")) return null;
  BARE.lastIndex = at;
  const found = BARE.exec(text);
  if (!found) return null;
  const url = found[0].replace(/[.,;:!?]{1,20}$/, "");
  const node = link(url, [url]);
  return node && { node, end: at + url.length };
}

/** Returns a link to another site, or null unless the address has one of three harmless schemes. */
function link(address, label) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, label);
}

function readMark(text, at, depth, unclosed) {
  const [mark, tag] = MARKS.find(([each]) => text.startsWith(each, at)) ?? [null];
  if (!mark || unclosed.has(mark)) return null;
  const inWord = mark[0] === "_" && /\w/.test(text[at - 1] ?? "");
  if (inWord || /\s/.test(text[at + mark.length] ?? " ")) return null;
  const end = closingMark(text, at + mark.length, mark);
  if (end < 0) {
    unclosed.add(mark);
    return null;
  }
  const inner = renderInline(text.slice(at + mark.length, end), depth + 1);
  return { node: element(tag, {}, inner), end: end + mark.length };
}

function closingMark(text, from, mark) {
  for (let end = text.indexOf(mark, from + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const single = mark.length === 2 || (text[end + 1] !== mark && text[end - 1] !== mark);
    const outside = mark[0] !== "_" || !/\w/.test(text[end + mark.length] ?? "");
    if (single && outside && !/[\s\\]/.test(text[end - 1])) return end;
  }
  return -1;
}
