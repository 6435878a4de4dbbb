// SPDX-License-Identifier: GPL-2.0-or-later
// Small parts that several views have.
import {
    Alert, AlertActionCloseButton, type AlertProps, Button, Form, FormGroup, Label, List, ListItem, Modal, ModalBody, ModalFooter, ModalHeader,
    TextInput,
} from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { type ReactNode, useState } from 'react';

import type { Finding, Severity } from './decode';
import { length, shown, state, tone } from './words';

const _ = cockpit.gettext;

/** Text that others wrote, as text: see `shown`. */
export const Foreign = ({ children }: { children: string }) => <bdi>{shown(children)}</bdi>;

/** A sentence of the agent's: between backticks is what an admin types. */
export const Prose = ({ children }: { children: string }) => {
    const parts = children.split("`");
    return parts.length % 2
        ? <>{parts.map((part, index) => index % 2
            ? <code key={index}><Foreign>{part}</Foreign></code>
            : <Foreign key={index}>{part}</Foreign>)}</>
        : <Foreign>{children}</Foreign>;
};

export const href = (...path: string[]): string => `#${cockpit.location.encode(path)}`;

/** A message in the page. Its title is no heading: those are the views' own. */
export const Notice = (props: AlertProps) => <Alert isInline component="p" {...props} />;

export const StateLabel = ({ value }: { value: string }) => <Label color={tone(value)}>{shown(state(value))}</Label>;

export const Failure = ({ title, text, onClose }: { title: string, text: string, onClose?: () => void }) =>
    <Notice variant="danger" isLiveRegion title={title}
           actionClose={onClose && <AlertActionCloseButton onClose={onClose} />}>
        <Prose>{text}</Prose>
    </Notice>;

const SEVERITIES: { severity: Severity, variant: "danger" | "warning" | "info", title: (count: number) => string }[] = [
    {
        severity: "error",
        variant: "danger",
        title: count => cockpit.format(cockpit.ngettext("$0 obstacle", "$0 obstacles", count), count),
    },
    {
        severity: "warning",
        variant: "warning",
        title: count => cockpit.format(cockpit.ngettext("$0 warning", "$0 warnings", count), count),
    },
    { severity: "info", variant: "info", title: count => cockpit.format(cockpit.ngettext("$0 remark", "$0 remarks", count), count) },
];

export const Findings = ({ findings }: { findings: Finding[] }) => {
    if (!findings.length)
        return <Notice variant="success" title={_("Nothing stands in the way.")} />;
    return <div className="cpr-stack">
        {SEVERITIES.map(({ severity, variant, title }) => {
            const found = findings.filter(one => one.severity === severity);
            return found.length > 0 && <Notice key={severity} variant={variant} title={title(found.length)}>
                <List isPlain isBordered>
                    {found.map((one, index) => <ListItem key={index}>
                        {one.vm && <><strong><Foreign>{one.vm}</Foreign></strong>{": "}</>}
                        <Prose>{one.what}</Prose>{" "}
                        {one.why && <><Prose>{one.why}</Prose>{" "}</>}
                        {one.remedy && <em><Prose>{one.remedy}</Prose></em>}
                    </ListItem>)}
                </List>
            </Notice>;
        })}
    </div>;
};

export const predicted = (findings: Finding[]): string => {
    const found = findings.find(one => one.code === "predicted-pause");
    return found?.seconds === undefined ? _("not known yet") : length(found.seconds);
};

/** Asks before an act; with `name`, for that name too. */
export const Confirm = ({ title, children, act, danger, name, onAct, onClose }: {
    title: string,
    children: ReactNode,
    act: string,
    danger?: boolean,
    name?: string,
    onAct: () => void,
    onClose: () => void,
}) => {
    const [typed, setTyped] = useState("");
    const ready = name === undefined || typed === name;
    const go = () => { if (ready) { onClose(); onAct() } };
    return <Modal isOpen variant="small" onClose={onClose} aria-labelledby="confirm-title" aria-describedby="confirm-body">
        <ModalHeader title={title} labelId="confirm-title" {...danger ? { titleIconVariant: "warning" as const } : {}} />
        <ModalBody id="confirm-body">
            <div className="cpr-stack">
                <div>{children}</div>
                {name !== undefined && <Form onSubmit={event => { event.preventDefault(); go() }}>
                    <FormGroup fieldId="confirm-name" label={cockpit.format(_("Type $0 to confirm"), shown(name))}>
                        <TextInput id="confirm-name" value={typed} autoComplete="off" spellCheck={false}
                                   onChange={(_event, value) => setTyped(value)} />
                    </FormGroup>
                </Form>}
            </div>
        </ModalBody>
        <ModalFooter>
            <Button variant={danger ? "danger" : "primary"} isDisabled={!ready} onClick={go}>{act}</Button>
            <Button variant="link" onClick={onClose}>{_("Cancel")}</Button>
        </ModalFooter>
    </Modal>;
};

/** Each proof that failed, as it was saved beside as it was found. */
export const Evidence = ({ rows }: { rows: { what: string, expected: string, found: string }[] }) =>
    <Table aria-label={_("Evidence")} variant="compact">
        <Thead><Tr><Th>{_("What")}</Th><Th>{_("At the save")}</Th><Th>{_("Found")}</Th></Tr></Thead>
        <Tbody>
            {rows.map((row, index) => <Tr key={index}>
                <Td dataLabel={_("What")}><Foreign>{row.what}</Foreign></Td>
                <Td dataLabel={_("At the save")}><span className="cpr-mono"><Foreign>{row.expected}</Foreign></span></Td>
                <Td dataLabel={_("Found")}><span className="cpr-mono"><Foreign>{row.found}</Foreign></span></Td>
            </Tr>)}
        </Tbody>
    </Table>;
