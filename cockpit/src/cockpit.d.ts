// SPDX-License-Identifier: GPL-2.0-or-later
// The part of Cockpit's base1/cockpit.js that this page uses (https://cockpit-project.org/guide/latest/api-base1).

export interface Problem {
    problem?: string | null;
    name?: string;
    message: string;
}

export interface Variant {
    t: string;
    v: unknown;
}

export interface Subscription {
    remove(): void;
}

export interface DBusClient {
    call(path: string, iface: string, method: string, args: unknown[],
         options: { type: string, timeout?: number }): Promise<unknown[]>;
    subscribe(match: { path?: string, path_namespace?: string, interface?: string, member?: string, arg0?: string },
              callback: (path: string, iface: string, signal: string, args: unknown[]) => void): Subscription;
    addEventListener(event: "close", listener: (event: Event, options: { problem?: string }) => void): void;
    close(problem?: string): void;
}

export interface Location {
    path: string[];
    options: Record<string, string | string[]>;
    go(path: string[], options?: Record<string, string>): void;
    encode(path: string[], options?: Record<string, string>, withRoot?: boolean): string;
}

export interface Permission {
    allowed: boolean | null;
    addEventListener(event: "changed", listener: () => void): void;
    close(): void;
}

export interface Cockpit {
    dbus(name: string, options: { bus: "system", superuser?: "try" | "require" }): DBusClient;
    file(path: string): { read(): Promise<string | null>, close(): void };
    spawn(args: string[], options: { superuser?: "try" | "require", err?: "message" }): Promise<string>;
    permission(options: { admin: true }): Permission;
    variant(type: string, value: unknown): Variant;
    gettext(message: string): string;
    ngettext(one: string, many: string, count: number): string;
    format(template: string, ...args: unknown[]): string;
    location: Location;
    language?: string;
    addEventListener(event: "locationchanged", listener: () => void): void;
    removeEventListener(event: "locationchanged", listener: () => void): void;
    transport: { wait(callback: () => void): void };
}

declare global {
    const cockpit: Cockpit;
}
