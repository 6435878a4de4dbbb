// SPDX-License-Identifier: GPL-2.0-or-later
import {
    Button, EmptyState, EmptyStateActions, EmptyStateBody, EmptyStateFooter, Nav, NavItem, NavList, Page, PageSection,
    Spinner,
} from '@patternfly/react-core';
import { type ReactNode, useEffect, useState } from 'react';

import type { Agent } from './agent';
import type * as decode from './decode';
import { arrived, COMMITTED, expect } from './arrival';
import { PageContext, useAdmin, useAgentState, useHost, useLocation } from './hooks';
import { JobBanners } from './jobs';
import { MemoryView } from './memory';
import { Overview } from './overview';
import { Failure, href, Notice, Prose } from './parts';
import { ReportView } from './report';
import { ReportsView } from './reports';
import { VmView } from './vm';
import { kind } from './words';

const _ = cockpit.gettext;
const VIEWS = [
    { path: [], name: _("Overview") },
    { path: ["reports"], name: _("Reports") },
    { path: ["memory"], name: _("Memory") },
];

const View = ({ path }: { path: string[] }) => {
    const [first, second] = path;
    switch (first) {
    case "vm": return <VmView key={second} name={second ?? ""} />;
    case "reports": return second ? <ReportView key={second} id={second} /> : <ReportsView />;
    case "memory": return <MemoryView />;
    default: return <Overview />;
    }
};

const Start = ({ admin }: { admin: boolean | null }) => {
    const [error, setError] = useState("");
    const [busy, setBusy] = useState(false);
    const start = () => {
        setBusy(true);
        setError("");
        cockpit.spawn(["systemctl", "start", "cpr-agent.service"], { superuser: "require", err: "message" })
                .then(() => setBusy(false))
                .catch((failed: { message: string }) => { setBusy(false); setError(failed.message) });
    };
    return <EmptyState headingLevel="h1" titleText={_("The agent is not running")} status="warning">
        <EmptyStateBody>
            {_("Guests run on without it, but none can be saved, and the host cannot be upgraded under them.")}
            {error && <Failure title={_("It could not be started.")} text={error} />}
        </EmptyStateBody>
        <EmptyStateFooter>
            <EmptyStateActions>
                <Button onClick={start} isLoading={busy} isDisabled={busy || admin === false}>{_("Start the agent")}</Button>
            </EmptyStateActions>
            {admin === false && <EmptyStateBody>{_("To start it, turn on administrative access.")}</EmptyStateBody>}
        </EmptyStateFooter>
    </EmptyState>;
};

/** The host goes next, unless this is an admin's own save. */
const SAVING = ["stopping", "saving", "saved"];

function farewell(host: string, upgrade: decode.Upgrade): string {
    const committed = upgrade.phase === COMMITTED;
    if (!upgrade.kernelTo)  // it was begun by systemctl
        return cockpit.format(committed ? _("$0 is on its way") : _("$0 restarts once its guests are saved"), host);
    return cockpit.format(
        committed ? _("$0 is on its way into kernel $1") : _("$0 restarts into kernel $1 once its guests are saved"),
        host, upgrade.kernelTo);
}

export const App = ({ agent }: { agent: Agent }) => {
    const state = useAgentState(agent);
    const admin = useAdmin();
    const host = useHost(state.manager.hostname);
    const path = useLocation();
    const upgrade = state.manager.lastUpgrade;
    const leaving = upgrade &&
        (upgrade.phase === COMMITTED || (upgrade.kind !== "save-all" && SAVING.includes(upgrade.phase)));

    useEffect(() => {
        if (state.link === "live" && upgrade) {
            if (leaving)
                expect(upgrade.id, upgrade.phase);
            else if (arrived(upgrade.id, upgrade.phase))
                cockpit.location.go(["reports", upgrade.id]);
        }
    }, [state.link, upgrade?.id, upgrade?.phase]);

    let content: ReactNode;
    const had = state.manager.version !== "";
    if (state.link === "denied") {
        content = <EmptyState headingLevel="h1" titleText={_("Limited access")} status="info">
            <EmptyStateBody>
                {_("This session may not look at the host's guests. Turn on administrative access, or ask an administrator.")}
            </EmptyStateBody>
        </EmptyState>;
    } else if (state.link === "absent") {
        content = <Start admin={admin} />;
    } else if (state.link === "failed") {
        content = <EmptyState headingLevel="h1" titleText={_("The agent cannot be reached")} status="danger">
            <EmptyStateBody><Prose>{state.problem}</Prose></EmptyStateBody>
            <EmptyStateFooter>
                <Button onClick={() => window.location.reload()}>{_("Try again")}</Button>
            </EmptyStateFooter>
        </EmptyState>;
    } else if (!had) {
        content = <EmptyState headingLevel="h1" titleText={_("Connecting to the agent")}
                              icon={() => <Spinner aria-label={_("Connecting")} />} />;
    } else {
        content = <>
            <Nav variant="horizontal-subnav" aria-label={_("Views")} className="cpr-nav">
                <NavList>
                    {VIEWS.map(view => <NavItem key={view.name} to={href(...view.path)}
                                                isActive={(path[0] === "vm" ? undefined : path[0]) === view.path[0]}>
                        {view.name}
                    </NavItem>)}
                </NavList>
            </Nav>
            {leaving && <Notice variant="warning" isLiveRegion title={farewell(host, upgrade)}>
                {_("This page will lose the host. Log in again when it is back: the page then opens with the report.")}
            </Notice>}
            {state.link === "restarting" && <Notice variant="info" isLiveRegion title={_("The agent is restarting")}>
                {_("Guests run on. What is shown here is how they were.")}
            </Notice>}
            {!state.manager.current && <Notice variant="warning"
                title={cockpit.format(_("The agent is of another version ($0) than this page"), state.manager.version)}>
                {_("Some things are not shown. Restart cpr-agent.service after an update of its package.")}
            </Notice>}
            {admin === false && <Notice variant="info" title={_("Limited access")}>
                {_("This session may look. Saving, loading and upgrading need administrative access.")}
            </Notice>}
            <JobBanners jobs={state.jobs} title={job => kind(job.kind)} />
            <View path={path} />
        </>;
    }
    return <PageContext.Provider value={{ agent, state, host }}>
        <Page isContentFilled className="pf-m-no-sidebar cpr-page">
            <PageSection hasBodyWrapper={false} isFilled><div className="cpr-stack">{content}</div></PageSection>
        </Page>
    </PageContext.Provider>;
};
