// SPDX-License-Identifier: GPL-2.0-or-later
import { createRoot } from 'react-dom/client';

import '@patternfly/patternfly/patternfly-base.css';
import { Agent } from './agent';
import { App } from './app';
import { followTheme } from './theme';
import './page.css'; // after those of the components, which it changes

followTheme();
document.addEventListener("DOMContentLoaded", () => cockpit.transport.wait(() => {
    document.title = cockpit.gettext("Kernel and guests");
    const agent = new Agent();
    createRoot(document.getElementById("app")!).render(<App agent={agent} />);
}));
