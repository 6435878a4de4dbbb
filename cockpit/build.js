#!/usr/bin/env node
// SPDX-License-Identifier: GPL-2.0-or-later
// Bundles src/ into OUT (dist without an argument), as Cockpit serves it: index.js and index.css compressed, and the
// licences of all that is in them. The same tree gives the same bytes: no dates, no paths, a fixed order.
import fs from 'node:fs';
import path from 'node:path';
import zlib from 'node:zlib';
import { fileURLToPath } from 'node:url';

import esbuild from 'esbuild';

const here = path.dirname(fileURLToPath(import.meta.url));
const outdir = path.resolve(process.argv[2] ?? path.join(here, 'dist'));
process.chdir(here);

// PatternFly's fonts are Cockpit's; its icon fonts and pictures are not used.
const patternflyAssets = {
    name: 'patternfly-assets',
    setup(build) {
        build.onLoad({ filter: /patternfly-base\.css$/ }, async args => ({
            contents: (await fs.promises.readFile(args.path, 'utf8'))
                    .replace(/@font-face\s*\{[^}]*(webfonts|pficon)[^}]*\}/g, '')
                    .replace(/url\("\.\/assets\/images\/[^"]*"\)/g, 'none')
                    .replace(/\.\/assets\/fonts\//g, '../../static/fonts/'),
            loader: 'css',
        }));
        build.onResolve({ filter: /^\.\.\/\.\.\/static\// }, args => ({ path: args.path, external: true }));
    },
};

function licences(inputs) {
    const packages = new Set();
    for (const input of inputs) {
        const found = input.match(/.*\bnode_modules\/((?:@[^/]+\/)?[^/]+)\//);
        if (found)
            packages.add(found[1]);
    }
    const texts = [...packages].sort().map(name => {
        const folder = path.join('node_modules', name);
        const { version, license } = JSON.parse(fs.readFileSync(path.join(folder, 'package.json'), 'utf8'));
        const file = fs.readdirSync(folder).find(one => /^(licen[cs]e|copying)/i.test(one));
        const text = file ? fs.readFileSync(path.join(folder, file), 'utf8').trim() : `Licence: ${license}`;
        return `${name} ${version} (${license})\n\n${text}\n`;
    });
    return texts.join(`\n${'-'.repeat(78)}\n\n`);
}

fs.rmSync(outdir, { recursive: true, force: true });
const result = await esbuild.build({
    bundle: true,
    charset: 'utf8',
    define: { 'process.env.NODE_ENV': '"production"' },
    entryPoints: ['src/index.tsx'],
    jsx: 'automatic',
    legalComments: 'none', // LICENSES.txt has the whole texts
    metafile: true, // inputs below node_modules, which may be elsewhere
    minify: true,
    outdir,
    plugins: [patternflyAssets],
    target: ['es2022'],
});
for (const name of ['index.js', 'index.css']) {
    const file = path.join(outdir, name);
    fs.writeFileSync(`${file}.gz`, zlib.gzipSync(fs.readFileSync(file), { level: 9 }));
    fs.rmSync(file);
}
for (const name of ['manifest.json', 'index.html'])
    fs.copyFileSync(path.join('src', name), path.join(outdir, name));
fs.writeFileSync(path.join(outdir, 'LICENSES.txt'), licences(Object.keys(result.metafile.inputs)));
