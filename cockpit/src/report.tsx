// SPDX-License-Identifier: GPL-2.0-or-later
import { Breadcrumb, BreadcrumbItem, Button, Card, CardBody, CardHeader, CardTitle } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useState } from 'react';

import * as decode from './decode';
import { useAnswer, usePage } from './hooks';
import { Evidence, Failure, Foreign, href, Notice, Prose } from './parts';
import { length, period, shown } from './words';

const _ = cockpit.gettext;

/** The class that gives a phase its colour, which is that of a report's picture. */
const LOOKS: Record<string, string> = {
    check: "check", "stop first": "first", save: "save", shutdown: "shutdown", saved: "shutdown", userspace: "userspace",
    devices: "devices", load: "load", resume: "resume", "take back": "devices", held: "held",
};

const PHASES: Record<string, string> = {
    check: _("check"), "stop first": _("stop first"), save: _("save"), shutdown: _("shutdown"), saved: _("saved"),
    userspace: _("userspace"), devices: _("devices"), load: _("load"), resume: _("resume"), "take back": _("take back"),
    held: _("held"), "kexec + kernel": _("kexec and kernel"),
};

const phase = (name: string): string => PHASES[name] ?? shown(name);
const look = (name: string): string => `cpr-phase-${LOOKS[name] ?? "kernel"}`;

const Timeline = ({ report }: { report: decode.Report }) => {
    const rows = [
        { name: report.host || _("Host"), spans: report.phases },
        ...report.guests.map(guest => ({ name: guest.vm, spans: guest.spans })),
    ].filter(row => row.spans.length > 0);
    const all = rows.flatMap(row => row.spans);
    if (!all.length)
        return null;
    const begin = Math.min(...all.map(span => span.begin));
    const whole = Math.max(...all.map(span => span.end)) - begin || 1;
    const names = [...new Set(all.map(span => span.name))];
    return <figure className="cpr-timeline">
        {rows.map((row, index) => <div className="cpr-row" key={index} role="img"
            aria-label={`${shown(row.name)}: ${row.spans.map(span => `${phase(span.name)} ${length(span.end - span.begin)}`).join(", ")}`}>
            <div className="cpr-row-name"><Foreign>{row.name}</Foreign></div>
            <div className="cpr-track">
                {row.spans.map((span, number) => <div key={number} className={`cpr-span ${look(span.name)}`}
                    title={`${phase(span.name)}: ${length(span.end - span.begin)}`}
                    style={{
                        insetInlineStart: `${100 * (span.begin - begin) / whole}%`,
                        inlineSize: `${100 * (span.end - span.begin) / whole}%`,
                    }} />)}
            </div>
        </div>)}
        <figcaption className="cpr-legend">
            {names.map(name => <span key={name}><span className={`cpr-swatch ${look(name)}`} />{phase(name)}</span>)}
            <span className="cpr-subtle">{cockpit.format(_("$0 in all"), length(whole))}</span>
        </figcaption>
    </figure>;
};

const FORMATS = [
    { form: "html", type: "text/html", label: _("Page (HTML)") },
    { form: "svg", type: "image/svg+xml", label: _("Picture (SVG)") },
    { form: "json", type: "application/json", label: _("Data (JSON)") },
];

const Downloads = ({ id }: { id: string }) => {
    const { agent } = usePage();
    const [error, setError] = useState("");
    const download = async ({ form, type }: { form: string, type: string }) => {
        try {
            const [content] = await agent.manager("Report", "ss", id, form);
            const url = URL.createObjectURL(new Blob([decode.text(content)], { type }));
            const link = document.createElement("a");
            link.href = url;
            link.download = `cpr-report-${id}.${form}`;
            link.click();
            window.setTimeout(() => URL.revokeObjectURL(url), 60000);
        } catch (failed) {
            setError((failed as Error).message);
        }
    };
    return <div className="cpr-actions">
        {FORMATS.map(format => <Button key={format.form} variant="secondary" size="sm" onClick={() => void download(format)}>
            {format.label}
        </Button>)}
        {error && <Failure title={_("It could not be downloaded.")} text={error} onClose={() => setError("")} />}
    </div>;
};

const TONES: Record<string, "success" | "danger" | "warning"> = { good: "success", bad: "danger", fair: "warning" };

const Whole = ({ report }: { report: decode.Report }) => <>
    <Card>
        <CardHeader actions={{ hasNoOffset: true, actions: <Downloads id={report.id} /> }}>
            <CardTitle component="h1"><Foreign>{report.headline}</Foreign></CardTitle>
        </CardHeader>
        <CardBody>
            <div className="cpr-stack">
                <Notice variant={TONES[report.tone] ?? "info"} title={<Foreign>{report.verdict}</Foreign>}>
                    {report.reason && <Prose>{report.reason}</Prose>}
                    {report.failures.map((failure, index) => <div key={index}><Prose>{failure}</Prose></div>)}
                </Notice>
                <div className="cpr-subtle">{period(report.startedAt, report.endedAt)}</div>
                <Timeline report={report} />
            </div>
        </CardBody>
    </Card>
    {report.guests.length > 0 && <Card>
        <CardTitle component="h2">{_("Guests")}</CardTitle>
        <CardBody>
            <Table aria-label={_("Guests")} variant="compact">
                <Thead><Tr>
                    <Th modifier="wrap">{_("Guest")}</Th><Th modifier="wrap">{_("Outcome")}</Th>
                    <Th modifier="wrap">{_("Pause")}</Th><Th modifier="wrap">{_("Phases")}</Th>
                </Tr></Thead>
                <Tbody>
                    {report.guests.map(guest => <Tr key={guest.vm}>
                        <Td dataLabel={_("Guest")}><a href={href("vm", guest.vm)}><Foreign>{guest.vm}</Foreign></a></Td>
                        <Td dataLabel={_("Outcome")}>
                            {shown(guest.outcome)}
                            {guest.why && <div className="cpr-subtle"><Prose>{guest.why}</Prose></div>}
                        </Td>
                        <Td dataLabel={_("Pause")} modifier="nowrap">{length(guest.pause)}</Td>
                        <Td dataLabel={_("Phases")}>
                            {guest.spans.map(span => `${phase(span.name)} ${length(span.end - span.begin)}`).join(", ") || "—"}
                        </Td>
                    </Tr>)}
                </Tbody>
            </Table>
            {report.guests.filter(guest => guest.evidence.length).map(guest => <div key={guest.vm}>
                <h3><Foreign>{guest.vm}</Foreign></h3><Evidence rows={guest.evidence} />
            </div>)}
        </CardBody>
    </Card>}
</>;

export const ReportView = ({ id }: { id: string }) => {
    const { agent, state } = usePage();
    const { value, error } = useAnswer(
        async () => decode.report(decode.text((await agent.manager("Report", "ss", id, "json"))[0])),
        `${id} ${state.manager.lastUpgrade?.phase}`);
    return <>
        <Breadcrumb>
            <BreadcrumbItem to={href("reports")}>{_("Reports")}</BreadcrumbItem>
            <BreadcrumbItem isActive><Foreign>{id.slice(0, 8)}</Foreign></BreadcrumbItem>
        </Breadcrumb>
        {error && <Failure title={_("This report cannot be shown.")} text={error} />}
        {value && <Whole report={value} />}
    </>;
};
