// SPDX-License-Identifier: GPL-2.0-or-later
import { Button, Card, CardBody, CardTitle, EmptyState, EmptyStateBody, Label } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useState } from 'react';

import * as decode from './decode';
import { usePage } from './hooks';
import { Failure, Foreign, href, Prose } from './parts';
import { kind, length, moment, outcome, shown } from './words';

const _ = cockpit.gettext;
const PAGE = 25;

const COLORS: Record<string, "green" | "red" | "orange"> = {
    done: "green", held: "red", refused: "orange", "rolled-back": "orange",
};

export const OutcomeLabel = ({ value }: { value: string }) =>
    <Label isCompact color={COLORS[value] ?? "grey"}>{shown(outcome(value))}</Label>;

export const ReportsView = () => {
    const { agent, state } = usePage();
    const [reports, setReports] = useState<decode.ReportEntry[]>();
    const [more, setMore] = useState(false);
    const [error, setError] = useState("");
    const fetch = async (before: number): Promise<decode.ReportEntry[]> => {
        const found = decode.reports((await agent.manager("ListReports", "ud", PAGE, before))[0]);
        setMore(found.length === PAGE);
        return found;
    };
    const over = state.jobs.filter(job => job.state !== "running").map(job => job.id).join();
    useEffect(() => {
        if (state.link !== "live")
            return;
        fetch(0).then(setReports, (failed: Error) => setError(failed.message));
    }, [agent, state.link, state.manager.lastUpgrade?.phase, over]);
    const next = () => {
        const last = reports?.at(-1)?.startedAt ?? 0;
        fetch(last).then(found => setReports(had => [...had ?? [], ...found]), (failed: Error) => setError(failed.message));
    };
    return <Card>
        <CardTitle component="h1">{_("Reports")}</CardTitle>
        <CardBody>
            {error && <Failure title={_("The reports cannot be listed.")} text={error} />}
            {reports && !reports.length && <EmptyState headingLevel="h2" titleText={_("No reports yet")} variant="sm">
                <EmptyStateBody>{_("Each upgrade, and each load of a guest, leaves one.")}</EmptyStateBody>
            </EmptyState>}
            {reports && reports.length > 0 && <Table aria-label={_("Reports")} variant="compact" gridBreakPoint="grid-lg">
                <Thead>
                    <Tr>
                        <Th modifier="wrap">{_("Began")}</Th><Th modifier="wrap">{_("What")}</Th>
                        <Th modifier="wrap">{_("Outcome")}</Th><Th modifier="wrap">{_("Guests")}</Th>
                        <Th modifier="wrap">{_("Longest pause")}</Th><Th modifier="wrap">{_("Kernel")}</Th>
                    </Tr>
                </Thead>
                <Tbody>
                    {reports.map(one => <Tr key={one.id}>
                        <Td dataLabel={_("Began")}><a href={href("reports", one.id)}>{moment(one.startedAt)}</a></Td>
                        <Td dataLabel={_("What")}>{shown(kind(one.kind))}</Td>
                        <Td dataLabel={_("Outcome")}>
                            <OutcomeLabel value={one.outcome} />
                            {one.reason && <div className="cpr-subtle"><Prose>{one.reason}</Prose></div>}
                        </Td>
                        <Td dataLabel={_("Guests")}><Foreign>{one.vms.join(", ") || "—"}</Foreign></Td>
                        <Td dataLabel={_("Longest pause")}>{length(one.longestPause)}</Td>
                        <Td dataLabel={_("Kernel")}>
                            {shown(one.kernelBefore === one.kernelAfter ? one.kernelAfter : `${one.kernelBefore} → ${one.kernelAfter}`)}
                        </Td>
                    </Tr>)}
                </Tbody>
            </Table>}
            {more && <Button variant="link" onClick={next}>{_("Show older ones")}</Button>}
        </CardBody>
    </Card>;
};
