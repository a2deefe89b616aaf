package control

import (
	"path/filepath"
	"testing"

	"blksnap/store"
)

// TestAddPartRefuses adds parts to the snapstore that cannot be any.
func TestAddPartRefuses(t *testing.T) {
	d := newTestDaemon(t, "vda")
	origin := d.sortedDevices()[0].Origin()
	part := filepath.Join(t.TempDir(), "part")
	add := func(spec string) error {
		_, err := d.addPart(t.Context(), PartRequest{Spec: spec, Force: true})
		return err
	}
	p, err := store.OpenFile(part, 1<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.pool.Add(p); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, spec, want string }{
		{"no spec", "x", `snapstore "x": it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH`},
		{"relative path", "file:x:1MiB", `path "x" of the snapstore is not absolute`},
		{"an origin", "file:" + origin + ":1MiB", "snapstore file:" + origin + ":1MiB is the origin of device vda"},
		{"a part", "file:" + part + ":2MiB", "snapstore file:" + part + ":2MiB is one of its parts already"},
	} {
		t.Run(tc.name, func(t *testing.T) { wantError(t, "error", add(tc.spec), tc.want) })
	}
	if got := d.pool.Parts(); len(got) != 2 || got[1].Limit != 1<<20 || got[1].Spec.Kind != store.File {
		t.Errorf("parts after refused requests\n got %+v\nwant memory and a file of 1 MiB", got)
	}
}

// TestAddPartTells adds a part whose spec says no limit: the event says what came.
func TestAddPartTells(t *testing.T) {
	spec := "dev:" + attachLoop(t, makeOrigin(t, 4<<20)) // detached after the daemon has closed it
	d := newTestDaemon(t)
	d.members = members{Parts: []memberPart{{No: 1, Spec: "mem"}}, open: map[uint8]bool{1: true}}
	if _, err := d.addPart(t.Context(), PartRequest{Spec: spec}); err != nil {
		t.Fatal(err)
	}
	events, _ := d.events.after(0)
	if got, want := events[len(events)-1].Text, spec+", "+people(d.pool.Parts()[1].Limit); got != want {
		t.Errorf("event\n got %q\nwant %q", got, want)
	}
}
