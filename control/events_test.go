package control

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func seqs(events []Event) (first, last uint64, n int) {
	if len(events) == 0 {
		return 0, 0, 0
	}
	return events[0].Seq, events[len(events)-1].Seq, len(events)
}

func TestEventsAfter(t *testing.T) {
	type span struct {
		first, last uint64
		n           int
	}
	for _, tc := range []struct {
		name  string
		added int
		after uint64
		want  span
	}{
		{"none", 0, 0, span{}},
		{"all", 3, 0, span{1, 3, 3}},
		{"rest", 3, 2, span{3, 3, 1}},
		{"nothing new", 3, 3, span{}},
		{"full", keptEvents, 0, span{1, keptEvents, keptEvents}},
		{"the oldest is gone", keptEvents + 1, 0, span{2, keptEvents + 1, keptEvents}},
		{"twice around", 2*keptEvents + 5, keptEvents, span{keptEvents + 6, 2*keptEvents + 5, keptEvents}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newEvents()
			for range tc.added {
				l.add(Event{Kind: "test"})
			}
			found, _ := l.after(tc.after)
			first, last, n := seqs(found)
			if got := (span{first, last, n}); got != tc.want {
				t.Errorf("events after %d of %d\n got %+v\nwant %+v", tc.after, tc.added, got, tc.want)
			}
		})
	}
}

// TestSlowFollower adds more events than are kept while a follower is busy: it
// goes on with those that are left.
func TestSlowFollower(t *testing.T) {
	l := newEvents()
	l.add(Event{})
	var got []uint64
	for e := range l.follow(t.Context()) {
		got = append(got, e.Seq)
		switch e.Seq {
		case 1:
			for range keptEvents + 9 {
				l.add(Event{})
			}
		case keptEvents + 10:
			if len(got) != 1+keptEvents || got[1] != 11 {
				t.Errorf("a follower that missed some\n got %d events, the second is %d\nwant %d, the second is 11", len(got), got[1], 1+keptEvents)
			}
			return
		}
	}
}

func TestFollowEnds(t *testing.T) {
	l := newEvents()
	l.add(Event{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	for range l.follow(ctx) {
		n++
		cancel()
	}
	if n != 1 {
		t.Errorf("events before the end\n got %d\nwant 1", n)
	}
}

// TestOverflowIsTold overwrites more than the snapstore holds: that it runs
// low, and what was lost then, must be among the events.
func TestOverflowIsTold(t *testing.T) {
	d := newTestDaemon(t)
	if _, err := d.addDevice(t.Context(), DeviceRequest{Name: "vda", Origin: makeOrigin(t, 12<<20)}, true); err != nil {
		t.Fatal(err)
	}
	data := strings.Repeat("x", 1<<20)
	for off := range int64(12) {
		write(t, d, "vda", data, off<<20) // what was a hole needs no store
	}
	take(t, d, "s")
	for off := range int64(12) {
		write(t, d, "vda", data, off<<20)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	told := map[string]string{}
	for e := range d.events.follow(ctx) {
		told[e.Kind] = e.Device + " " + e.Snapshot
		if len(told) == 5 {
			break
		}
	}
	want := map[string]string{
		"device-added": "vda ", "generation": "vda ", "snapshot-created": " s",
		"store-low": " ", "snapshot-overflowed": "vda s",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("events of an overflow, -want +got:\n%s", diff)
	}
	if s, err := d.snapshotInfo("s"); s.State != "overflowed" || err != nil {
		t.Errorf("state of the snapshot\n got %q, %v\nwant overflowed", s.State, err)
	}
}
