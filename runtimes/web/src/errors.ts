/** An error for people: what happened, and the next step. */
export class AppError extends Error {
  readonly hint: string;

  constructor(message: string, hint = "") {
    super(message);
    this.name = "AppError";
    this.hint = hint;
  }
}

/** What is left of an error after it crossed from a worker. */
export interface Told {
  readonly message: string;
  readonly hint: string;
}

/** Any thrown value in one line. */
export function told(error: unknown): Told {
  if (error instanceof AppError) return { message: error.message, hint: error.hint };
  const text = error instanceof Error ? error.message || error.name : String(error);
  return { message: text.replace(/\s+/g, " ").slice(0, 400), hint: "" };
}
