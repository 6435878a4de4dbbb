// SPDX-License-Identifier: GPL-2.0-or-later
// The agent on the system bus: its objects as they are now, kept by its signals. Nothing is asked twice.
import * as decode from './decode';

export const NAME = "org.cpragent1";
export const ROOT = "/org/cpragent1";
const PROPERTIES = "org.freedesktop.DBus.Properties";
const OBJECTS = "org.freedesktop.DBus.ObjectManager";
const BUS = "org.freedesktop.DBus";
/** A restart takes less; after it, the agent counts as not running. */
const RESTART_MS = 8000;
/** So long the page says how a job ended. */
const ENDED_MS = 30000;

export type Link = "connecting" | "live" | "restarting" | "absent" | "denied" | "failed";

export interface State {
    link: Link;
    /** Why it is not live. */
    problem: string;
    manager: decode.Manager;
    vms: decode.Vm[];
    jobs: decode.Job[];
}

export class AgentError extends Error {
    constructor(readonly kind: string, message: string) {
        super(message);
    }
}

type Interfaces = Map<string, decode.Dict>;

function agentError(found: unknown): AgentError {
    const problem = found as cockpitProblem;
    const name = problem.name ?? problem.problem ?? "";
    return new AgentError(name.replace(/^.*\./, ""), problem.message || name);
}

interface cockpitProblem { name?: string, problem?: string, message?: string }

export class Agent {
    private client: ReturnType<typeof cockpit.dbus> | undefined;
    private objects = new Map<string, Interfaces>();
    private removals = new Map<string, number>();
    private listeners = new Set<() => void>();
    private state: State;
    private owner = "";
    private timer = 0;
    private planned = false;

    constructor() {
        this.state = this.read("connecting", "");
        const bus = cockpit.dbus(BUS, { bus: "system" });
        bus.addEventListener("close", (_event, options) => this.say("failed", options.problem ?? ""));
        bus.subscribe({ interface: BUS, member: "NameOwnerChanged", arg0: NAME },
                      (_path, _iface, _signal, args) => this.owned(decode.text(args[2])));
        bus.call("/org/freedesktop/DBus", BUS, "GetNameOwner", [NAME], { type: "s" })
                .then(([owner]) => this.owned(decode.text(owner)))
                // A systemd that can start it does so at the first call.
                .catch(() => bus.call("/org/freedesktop/DBus", BUS, "StartServiceByName", [NAME, 0], { type: "su" })
                        .then(() => undefined)
                        .catch(() => { if (!this.owner) this.say("absent", "") }));
    }

    readonly subscribe = (listener: () => void): (() => void) => {
        this.listeners.add(listener);
        return () => this.listeners.delete(listener);
    };

    readonly snapshot = (): State => this.state;

    /** Raises AgentError. */
    async call(path: string, iface: string, method: string, type: string, ...args: unknown[]): Promise<unknown[]> {
        if (!this.client)
            throw new AgentError("NotRunning", cockpit.gettext("The agent is not running."));
        try {
            return (await this.client.call(path, `${NAME}.${iface}`, method, args, { type })).map(decode.plain);
        } catch (error) {
            throw agentError(error);
        }
    }

    manager(method: string, type = "", ...args: unknown[]): Promise<unknown[]> {
        return this.call(ROOT, "Manager", method, type, ...args);
    }

    /** Asks again for what the agent does not announce. */
    async refresh(path: string, iface: string): Promise<void> {
        const client = this.client;
        if (!client)
            return;
        try {
            const [properties] = await client.call(path, PROPERTIES, "GetAll", [`${NAME}.${iface}`], { type: "s" });
            if (this.objects.has(path) && client === this.client)
                this.put(path, { [`${NAME}.${iface}`]: properties });
        } catch {
            // It is gone, and a signal says so.
        }
    }

    private owned(owner: string): void {
        if (owner === this.owner && (owner || this.state.link !== "connecting"))
            return;
        this.owner = owner;
        window.clearTimeout(this.timer);
        const client = this.client;
        this.client = undefined;
        client?.close();
        this.removals.forEach(timer => window.clearTimeout(timer));
        this.removals.clear();
        if (owner) {
            this.connect();
        } else {
            this.say("restarting", "");
            this.timer = window.setTimeout(() => this.say("absent", ""), RESTART_MS);
        }
    }

    private connect(): void {
        const client = cockpit.dbus(NAME, { bus: "system", superuser: "try" });
        this.client = client;
        const objects = new Map<string, Interfaces>();
        let early: (() => void)[] | undefined = [];
        const now = (work: () => void) => early ? early.push(work) : work();
        client.addEventListener("close", (_event, options) => {
            if (client === this.client)
                this.say("failed", options.problem ?? "");
        });
        client.subscribe({ path_namespace: ROOT, interface: PROPERTIES, member: "PropertiesChanged" },
                         (path, _iface, _signal, args) => now(() => this.changed(path, args)));
        client.subscribe({ path_namespace: ROOT, interface: OBJECTS }, (_path, _iface, signal, args) => now(() => {
            const path = decode.text(args[0]);
            if (signal === "InterfacesAdded")
                this.put(path, args[1]);
            else if (signal === "InterfacesRemoved")
                this.remove(path);
        }));
        client.subscribe({ path: ROOT, interface: `${NAME}.Manager`, member: "JobRemoved" },
                         (_path, _iface, _signal, args) => now(() => this.ended(args)));
        client.call(ROOT, OBJECTS, "GetManagedObjects", [], { type: "" }).then(async ([found]) => {
            const properties = decode.isDict(found) && decode.isDict(found[ROOT])
                ? undefined
                : (await client.call(ROOT, PROPERTIES, "GetAll", [`${NAME}.Manager`], { type: "s" }))[0];
            if (client !== this.client)
                return;
            this.objects = objects;
            if (properties)
                this.put(ROOT, { [`${NAME}.Manager`]: properties });
            for (const [path, interfaces] of Object.entries(decode.isDict(found) ? found : {}))
                this.put(path, interfaces);
            const waiting = early ?? [];
            early = undefined;
            waiting.forEach(work => work());
            this.say("live", "");
        }).catch(found => {
            if (client !== this.client)
                return;
            const error = agentError(found);
            this.objects = objects;
            this.say(["AccessDenied", "NotAuthorized", "access-denied"].includes(error.kind) ? "denied" : "failed", error.message);
        });
    }

    private put(path: string, interfaces: unknown): void {
        if (!decode.isDict(interfaces))
            return;
        const had = this.objects.get(path) ?? new Map<string, decode.Dict>();
        for (const [iface, properties] of Object.entries(interfaces)) {
            if (iface.startsWith(NAME) && decode.isDict(properties))
                had.set(iface, { ...had.get(iface), ...properties });
        }
        if (had.size) {
            this.objects.set(path, had);
            this.plan();
        }
    }

    private changed(path: string, args: unknown[]): void {
        const [iface, properties, invalidated] = args;
        if (!this.objects.has(path))
            return;
        this.put(path, { [decode.text(iface)]: properties });
        // Which QEMU it is in is announced by its PID alone.
        if (decode.list(invalidated).length || (decode.isDict(properties) && "MainPID" in properties))
            void this.refresh(path, decode.text(iface).replace(/^.*\./, ""));
    }

    /** The object of an ended job stays; its last word comes with the signal, also from an agent that drops it at once. */
    private ended(args: unknown[]): void {
        const [, path, result, error] = args;
        const job = decode.text(path);
        const had = this.objects.get(job)?.get(`${NAME}.Job`);
        if (!had)
            return;
        const state = decode.text(had.State && decode.plain(had.State));
        this.put(job, {
            [`${NAME}.Job`]: { Result: result, State: state === "running" ? "ended" : state, ...error ? { Error: error } : {} }
        });
        this.removals.set(job, window.setTimeout(() => this.forget(job), ENDED_MS));
    }

    private remove(path: string): void {
        if (!this.removals.has(path))
            this.forget(path);
    }

    forget(path: string): void {
        window.clearTimeout(this.removals.get(path));
        this.removals.delete(path);
        this.objects.delete(path);
        this.plan();
    }

    /** Many signals come at once; they are shown once. */
    private plan(): void {
        if (this.planned)
            return;
        this.planned = true;
        queueMicrotask(() => {
            this.planned = false;
            this.say(this.state.link, this.state.problem);
        });
    }

    private say(link: Link, problem: string): void {
        this.state = this.read(link, problem);
        this.listeners.forEach(listener => listener());
    }

    private read(link: Link, problem: string): State {
        const vms: decode.Vm[] = [];
        const jobs: decode.Job[] = [];
        for (const [path, interfaces] of this.objects) {
            const vm = interfaces.get(`${NAME}.VM`);
            if (vm)
                vms.push(decode.vm(path, vm));
            const job = interfaces.get(`${NAME}.Job`);
            if (job)
                jobs.push(decode.job(path, job));
        }
        vms.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
        jobs.sort((a, b) => a.id - b.id);
        const manager = decode.manager(this.objects.get(ROOT)?.get(`${NAME}.Manager`) ?? {});
        return { link, problem, manager, vms, jobs };
    }
}
