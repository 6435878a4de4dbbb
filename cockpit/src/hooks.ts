// SPDX-License-Identifier: GPL-2.0-or-later
import { createContext, useCallback, useContext, useEffect, useRef, useState, useSyncExternalStore } from 'react';

import type { Agent, State } from './agent';

export interface Context {
    agent: Agent;
    state: State;
    host: string;
}

export const PageContext = createContext<Context | undefined>(undefined);

export function usePage(): Context {
    const context = useContext(PageContext);
    if (!context)
        throw new Error("no page around this component");
    return context;
}

export function useAgentState(agent: Agent): State {
    return useSyncExternalStore(agent.subscribe, agent.snapshot);
}

export function useLocation(): string[] {
    const [path, setPath] = useState(cockpit.location.path);
    useEffect(() => {
        const changed = () => setPath(cockpit.location.path);
        cockpit.addEventListener("locationchanged", changed);
        return () => cockpit.removeEventListener("locationchanged", changed);
    }, []);
    return path;
}

export function useAdmin(): boolean | null {
    const [allowed, setAllowed] = useState<boolean | null>(null);
    useEffect(() => {
        const permission = cockpit.permission({ admin: true });
        const changed = () => setAllowed(permission.allowed);
        permission.addEventListener("changed", changed);
        changed();
        return () => permission.close();
    }, []);
    return allowed;
}

export function useHost(named: string): string {
    const [read, setRead] = useState("");
    useEffect(() => {
        const file = cockpit.file("/proc/sys/kernel/hostname");
        file.read().then(content => setRead(content?.trim() ?? "")).catch(() => setRead(""));
        return () => file.close();
    }, []);
    return named || read;
}

/** The answer of a question that is asked of an agent which runs, and again whenever `key` changes. */
export function useAnswer<T>(ask: () => Promise<T>, key: string): { value: T | undefined, error: string, again: () => void } {
    const [value, setValue] = useState<T>();
    const [error, setError] = useState("");
    const [count, setCount] = useState(0);
    const live = usePage().state.link === "live";
    const question = useRef(ask);
    question.current = ask;
    useEffect(() => {
        if (!live)
            return undefined;
        let current = true;
        question.current().then(
            found => { if (current) { setValue(found); setError("") } },
            (failed: Error) => { if (current) setError(failed.message) });
        return () => { current = false };
    }, [key, count, live]);
    return { value, error, again: useCallback(() => setCount(had => had + 1), []) };
}
