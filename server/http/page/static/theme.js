// Runs before the page is shown, so that a chosen theme does not flash. Without a choice, the system's theme applies.
try {
  const theme = localStorage.getItem("jamba.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // The browser denies storage: the system's theme applies.
}
