package cow

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blksnap/store"
)

// inspect verifies the state of a site that nobody uses.
func inspect(t *testing.T, dir string) []Problem {
	t.Helper()
	spec := store.Spec{Kind: store.File, Path: filepath.Join(dir, "store")}
	i := Inspection{Run: filepath.Join(dir, "run"), State: filepath.Join(dir, "state"), Slots: func(part uint8) (int64, error) {
		if part != 1 {
			return 0, fmt.Errorf("there is no part %d", part)
		}
		_, n, err := store.Inspect(spec)
		return n, err
	}}
	found, err := i.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestInspectAtEveryStep looks at what a process leaves that is killed after any change
// of state: a start makes sense of all of it, so nothing is wrong with it.
func TestInspectAtEveryStep(t *testing.T) {
	lives := livesOf(t, 64<<20, (*script).run, &met{})
	for _, l := range append(lives, livesOf(t, 640<<10, (*script).runFull, &met{})...) {
		for _, p := range inspect(t, l.dir) {
			t.Errorf("after %q: %s: %s", l.what, p.File, p.Text)
		}
	}
}

// oneSite leaves the state of a site that has everything in it.
func oneSite(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	newSite(t, dir)
	s := openSite(t, dir, 64<<20, nil)
	c := &script{t: t, s: s, facts: facts{
		live:  [][]byte{make([]byte, siteSize), make([]byte, siteSize)},
		snaps: make(map[string][][]byte),
	}, numbers: []map[string]uint64{{}, {}}}
	c.write(1, 0, siteSize)
	c.take("one")
	c.write(2, 0, 70000)
	c.takeWith("two", TakeOptions{Writable: true})
	c.writeImage("two", 50, 2000, 70000)
	c.write(3, 100000, 70000)
	c.take("three")
	c.write(4, 0, 200000)
	s.close(t)
	return dir
}

// filesIn are the regular files below dir, with their content.
func filesIn(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		files[path], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestInspectHostile spoils each file of the state, one byte after the other, and by
// cutting it short. Nothing makes an inspection panic, hang, or change anything; and
// what checksums and structure cover does not go unnoticed.
func TestInspectHostile(t *testing.T) {
	dir, rng := oneSite(t), newRand(t)
	if found := inspect(t, dir); len(found) > 0 {
		t.Fatalf("sound state: %v", found)
	}
	before := filesIn(t, dir)
	for path, b := range before {
		rel, _ := filepath.Rel(dir, path)
		if !strings.HasPrefix(rel, "run/") && !strings.HasPrefix(rel, "state/") || filepath.Base(path) == "lock" {
			continue
		}
		spoil := func(what string, now []byte, mustSee bool) {
			t.Helper()
			if err := os.WriteFile(path, now, 0o600); err != nil {
				t.Fatal(err)
			}
			found := inspect(t, dir)
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, now) {
				t.Fatalf("%s, %s: the inspection changed it (%v)", rel, what, err)
			}
			if mustSee && len(found) == 0 {
				t.Errorf("%s, %s: nobody notices", rel, what)
			}
			if len(found) > 3*maxProblems {
				t.Errorf("%s, %s: %d problems", rel, what, len(found))
			}
		}
		for _, at := range placesIn(rng, b) {
			now := bytes.Clone(b)
			now[at] ^= 1 << rng.IntN(8)
			spoil(fmt.Sprintf("byte %d flipped", at), now, covered(rel, b, at))
		}
		for _, n := range []int{1, 511, 512, 4095, 4096, 5000, 64<<10 - 1, len(b) / 2, len(b) - 1} {
			if n < len(b) {
				// Whole steps of memory may hold nothing yet.
				spoil(fmt.Sprintf("cut to %d bytes", n), b[:n], n%memoryStep != 0)
			}
		}
		spoil("emptied", nil, true)
		spoil("of another kind", []byte("#!/bin/sh\n"), true)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !maps.EqualFunc(filesIn(t, dir), before, bytes.Equal) {
		t.Error("inspections have changed the state")
	}
}

// placesIn are offsets worth a try: those of what is there, and a few others.
func placesIn(rng *rand.Rand, b []byte) []int {
	var full, places []int
	for at, v := range b {
		if v != 0 {
			full = append(full, at)
		}
	}
	for _, at := range full {
		if len(full) < 100 || rng.IntN(len(full)) < 100 {
			places = append(places, at)
		}
	}
	for range 20 {
		places = append(places, rng.IntN(max(1, len(b))))
	}
	if len(b) == 0 {
		return nil
	}
	return places
}

// covered says whether a flipped bit of the file must be noticed.
func covered(rel string, b []byte, at int) bool {
	switch name := filepath.Base(rel); {
	case name == "catalogue": // header; records by chance
		return at < catalogueConstant
	case name == "lease":
		return at < checkpointHeader
	case name == "map":
		return true
	case name == registerName:
		return at < registerHeader
	case strings.HasPrefix(name, "layer"), strings.HasPrefix(name, "overlay"):
		return at < layerConstant
	}
	return false
}

// TestInspectTells spoils one thing at a time, and looks for the words.
func TestInspectTells(t *testing.T) {
	for _, tc := range []struct {
		name, file, want string
		spoil            func(t *testing.T, path string)
	}{
		{"a slot twice", "run/devices/a/layer-2", "which chunk 0 of", func(t *testing.T, path string) {
			copyWord(t, filepath.Join(filepath.Dir(path), "layer-0"), 0, path, 3)
		}},
		{"a slot that is not there", "run/devices/b/layer-2", "1 of its words need what is not there: part 1: it has", func(t *testing.T, path string) {
			setWord(t, path, 0, makeWord(1<<40|1<<31, 1))
		}},
		{"a part that is not there", "run/devices/b/layer-2", "1 of its words need what is not there: part 7: there is no part 7", func(t *testing.T, path string) {
			setWord(t, path, 0, makeWord(7<<40, 1))
		}},
		{"no mask", "run/devices/b/layer-2", "the word of chunk 1 makes no sense", func(t *testing.T, path string) {
			setWord(t, path, 1, makeWord(1<<40, 0))
		}},
		{"a layer that is gone", "run/devices/b/layer-0", "it is not there", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"a lease that is gone", "run/devices/b/lease", "it is not there, and layers are", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"a map that is gone", "run/devices/b/changes", "it is not there, and layers are", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"a layer of another device", "run/devices/b/layer-0", "it was replaced by another file", func(t *testing.T, path string) {
			b, err := os.ReadFile(strings.Replace(path, "/b/", "/a/", 1))
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"the register", "run/devices/b/layers", "nobody knows whether all layers are", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}},
		{"a number that was given to another", "run/devices/b/layer-2", "it was replaced by another file", func(t *testing.T, path string) {
			b, err := os.ReadFile(filepath.Join(filepath.Dir(path), "layer-1"))
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"a frozen map", "run/devices/b/layer-2", "the change map 77 of snapshot three is lost", func(t *testing.T, path string) {
			edit(t, path, func(b []byte) { host.PutUint64(b[layerCBT:], 77) })
		}},
		{"a lease for years", "run/devices/b/lease", "until then nobody notices writes behind our back", func(t *testing.T, path string) {
			edit(t, path, func(b []byte) { host.PutUint64(b[leaseAt:], 1<<62) })
		}},
		{"a record of another generation", "state/devices/a/regions", "it does not belong to the map beside it", func(t *testing.T, path string) {
			b, err := os.ReadFile(strings.Replace(path, "/a/", "/b/", 1))
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"a directory", "state/devices/a/map", "it is not a regular file", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := oneSite(t)
			path := filepath.Join(dir, tc.file)
			tc.spoil(t, path)
			found := inspect(t, dir)
			if len(found) == 0 || found[0].File != path || !strings.Contains(found[0].Text, tc.want) || found[0].Advice == "" {
				t.Errorf("got %+v\nwant a problem of %s: %s", found, path, tc.want)
			}
		})
	}
}

// TestInspectBegun looks at files that a process had made and was killed before it wrote
// to them: nobody misses what was to be in them.
func TestInspectBegun(t *testing.T) {
	added := func(files ...string) map[string]int64 { // a device that was being added
		m := make(map[string]int64)
		for _, f := range files {
			m["run/devices/c/"+f] = memoryStep
		}
		return m
	}
	with := func(m map[string]int64, file string) map[string]int64 {
		m[file] = 0
		return m
	}
	for _, tc := range []struct {
		name  string
		files map[string]int64 // and their lengths
	}{
		{"a lease", with(added(), "run/devices/c/lease")},
		{"a lease of zeroes", added("lease")},
		{"a change map", with(added(), "run/devices/c/changes")},
		{"a lease after the change map", with(added("changes"), "run/devices/c/lease")},
		{"a register", with(added("changes"), "run/devices/c/layers")},
		{"a layer", map[string]int64{"run/devices/a/layer-9": 0}},
		{"an overlay", map[string]int64{"run/devices/a/layer-9": memoryStep, "run/devices/a/overlay-9": 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := oneSite(t)
			for file, n := range tc.files {
				path := filepath.Join(dir, file)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, make([]byte, n), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			if found := inspect(t, dir); len(found) > 0 {
				t.Errorf("got %+v\nwant nothing", found)
			}
		})
	}
	for name, n := range map[string]int64{"no lease after the register": -1, "a lease after the register": 0, "a lease of zeroes after the register": memoryStep} {
		t.Run(name, func(t *testing.T) {
			dir := oneSite(t)
			device := filepath.Join(dir, "run", "devices", "c")
			if err := os.Mkdir(device, 0o700); err != nil {
				t.Fatal(err)
			}
			r, err := newRegister(filepath.Join(device, registerName))
			if err == nil {
				err = r.close()
			}
			if err == nil && n >= 0 {
				err = os.WriteFile(filepath.Join(device, "lease"), make([]byte, n), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			if found := inspect(t, dir); len(found) > 0 {
				t.Errorf("got %+v\nwant nothing", found)
			}
		})
	}
	t.Run("a catalogue", func(t *testing.T) {
		dir := t.TempDir()
		newSite(t, dir)
		if err := os.WriteFile(filepath.Join(dir, "run", "catalogue"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if found := inspect(t, dir); len(found) > 0 {
			t.Errorf("got %+v\nwant nothing", found)
		}
	})
}

// edit changes a file's bytes.
func edit(t *testing.T, path string, f func(b []byte)) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		f(b)
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wordOf finds the place of a chunk's word in a small table's file.
func wordOf(t *testing.T, b []byte, c chunkNo) []byte {
	t.Helper()
	if levels, _ := tableShape(chunks(siteSize)); levels != 0 {
		t.Fatal("the table is larger than a leaf")
	}
	return b[tableHeader+8*c:][:8]
}

func setWord(t *testing.T, path string, c chunkNo, w word) {
	t.Helper()
	edit(t, path, func(b []byte) { host.PutUint64(wordOf(t, b, c), uint64(w.checked(c))) })
}

func copyWord(t *testing.T, from string, c chunkNo, to string, d chunkNo) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	setWord(t, to, d, word(host.Uint64(wordOf(t, b, c)))&^checkBits)
}
