package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"blksnap/intercept"
)

// TestRollback rolls devices back that have clients and such as have none.
func TestRollback(t *testing.T) {
	d := newTestDaemon(t, "vda", "vdb", "vdc")
	if _, err := d.take(SnapshotRequest{Name: "s", Devices: []string{"vda", "vdb"}}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vda", "vdb"} {
		write(t, d, name, "new", 0)
	}
	clients := map[string]intercept.Export{"vdb": open(t, d, "vdb")}
	var cut []string
	d.setDisconnect(func(_ context.Context, export string) error {
		cut = append(cut, export)
		if c, ok := clients[export]; ok {
			c.Release()
			delete(clients, export)
		}
		return nil
	})
	content := func(name string) string {
		t.Helper()
		dev, err := d.device(name)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 3)
		if err := dev.Read(p, 0); err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	const old = "\x00\x00\x00"
	for _, tc := range []struct {
		name, snapshot string
		q              RollbackRequest
		devices        []string
		err            string
		vda, vdb       string // what they hold then
		cut            []string
	}{
		{"unknown snapshot", "x", RollbackRequest{}, nil, `there is no snapshot "x"`, "new", "new", nil},
		{"unknown device", "s", RollbackRequest{Devices: []string{"vda", "x"}}, nil, `snapshot s has no device "x"`, "new", "new", nil},
		{"device that is not in it", "s", RollbackRequest{Devices: []string{"vdc"}}, nil, `snapshot s has no device "vdc"`, "new", "new", nil},
		{"one with a client", "s", RollbackRequest{}, nil, "device vdb has 1 NBD connection open", "new", "new", nil},
		{"another one", "s", RollbackRequest{Devices: []string{"vda"}}, []string{"vda"}, "<nil>", old, "new", []string{"vda"}},
		{"by force", "s", RollbackRequest{Force: true}, []string{"vda", "vdb"}, "<nil>", old, old, []string{"vda", "vdb"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cut = nil
			v, err := d.rollBack(t.Context(), tc.snapshot, tc.q)
			wantError(t, "roll back", err, tc.err)
			if diff := cmp.Diff(tc.devices, v.Devices); diff != "" {
				t.Errorf("devices, -want +got:\n%s", diff)
			}
			if got, want := [2]string{content("vda"), content("vdb")}, [2]string{tc.vda, tc.vdb}; got != want {
				t.Errorf("content of vda and vdb\n got %q\nwant %q", got, want)
			}
			if diff := cmp.Diff(tc.cut, cut); diff != "" {
				t.Errorf("disconnected, -want +got:\n%s", diff)
			}
		})
	}
	open(t, d, "vdb").Release() // clients are let in again
}

// TestRollbackOfClientsThatStay fails, and has changed nothing, where a client cannot
// be disconnected.
func TestRollbackOfClientsThatStay(t *testing.T) {
	d := newTestDaemon(t, "vda")
	take(t, d, "s")
	write(t, d, "vda", "new", 0)
	e := open(t, d, "vda")
	defer e.Release()
	d.setDisconnect(func(context.Context, string) error { return errors.New("1 of 1 connections") })
	_, err := d.rollBack(t.Context(), "s", RollbackRequest{Force: true})
	wantError(t, "roll back", err, "disconnect the clients of vda: 1 of 1 connections")
	p := make([]byte, 3)
	if err := e.Device.Read(p, 0); err != nil || string(p) != "new" {
		t.Errorf("content afterwards\n got %q, %v\nwant new", p, err)
	}
	open(t, d, "vda").Release()
}

// TestWhileRollingBack looks at a device that is being rolled back.
func TestWhileRollingBack(t *testing.T) {
	d := newTestDaemon(t, "vda")
	if _, err := d.take(SnapshotRequest{Name: "s", TTL: time.Nanosecond}); err != nil {
		t.Fatal(err)
	}
	chosen, err := d.reserveRollback("s", RollbackRequest{})
	if err != nil {
		t.Fatal(err)
	}
	const rolling = "device vda is being rolled back to s"
	if _, err := (exports{d}).Open(t.Context(), "vda", "test"); !errors.Is(err, syscall.EBUSY) || err.Error() != rolling {
		t.Errorf("open the device\n got %v\nwant %s", err, rolling)
	}
	_, err = d.rollBack(t.Context(), "s", RollbackRequest{Force: true})
	wantError(t, "roll it back again", err, rolling)
	info, err := d.deviceInfo("vda")
	if err != nil {
		t.Fatal(err)
	}
	live, _ := treeSource{d}.Device("vda")
	for what, got := range map[string]string{"device show": info.State, "the tree": live.State()} {
		if want := "ok, rolling back to s"; got != want {
			t.Errorf("state in %s\n got %s\nwant %s", what, got, want)
		}
	}
	d.expireAt(time.Now().Add(time.Hour))
	if _, err := d.snapshot("s"); err != nil {
		t.Errorf("a snapshot whose time is over is gone, although a device is being rolled back to it: %v", err)
	}
	d.releaseRollbacks(chosen...)
	d.rollbacks.Done()
	d.expireAt(time.Now().Add(time.Hour))
	if _, err := d.snapshot("s"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("the snapshot afterwards\n got %v\nwant it gone", err)
	}
	events, _ := d.events.after(0)
	if got := strings.Count(fmt.Sprint(events), "snapshot-expired"); got != 1 {
		t.Errorf("events of its end\n got %d\nwant 1", got)
	}
}
