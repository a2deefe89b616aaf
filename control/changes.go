// Change tracking at a client's request: extents, marking, a new generation.

package control

import (
	"fmt"
	"iter"
	"strconv"
	"syscall"

	"blksnap/cow"
)

// Since says since when: the number of a snapshot, or all.
type Since string

// sinceAll asks for everything that is allocated.
const sinceAll Since = "all"

// UnmarshalText reads what a Since can be.
func (s *Since) UnmarshalText(text []byte) error {
	*s = Since(text)
	if _, ok := parseNumber(string(text)); !ok && *s != sinceAll {
		return s.refuse()
	}
	return nil
}

func (s Since) refuse() error {
	return refuse(syscall.EINVAL, "since %q is neither a snapshot's number nor all", clip(string(s)))
}

// changesInfo describes a device's change tracking as of now.
func (d *Daemon) changesInfo(device string) (ChangesInfo, error) {
	dev, err := d.device(device)
	if err != nil {
		return ChangesInfo{}, err
	}
	return changesOf(dev), nil
}

// extents is what a copy has to read, by the rules of the tree's since/NUM. The
// error is ErrFullRead where that is not known, in this generation or at all.
func (d *Daemon) extents(device string, q ExtentsQuery) (iter.Seq2[Extent, error], error) {
	c, err := d.changesAt(device, q.At)
	if err != nil {
		return nil, err
	}
	if q.Generation != "" && q.Generation != c.Generation() {
		return nil, fmt.Errorf("device %s is in generation %s, not %s: %w", device, c.Generation(), clip(q.Generation), ErrFullRead)
	}
	if q.Since == sinceAll {
		return asExtents(c.All()), nil
	}
	num, ok := parseNumber(string(q.Since))
	if !ok {
		return nil, q.Since.refuse()
	}
	runs, ok := c.Since(num)
	if !ok {
		return nil, fmt.Errorf("changes of %s since %d are not known, only since %d to %d: %w", device, num, c.Base(), c.Number(), ErrFullRead)
	}
	return asExtents(runs), nil
}

// changesAt is a device's change tracking as of now, or frozen at a snapshot.
func (d *Daemon) changesAt(device, snapshot string) (*cow.Changes, error) {
	if snapshot == "" {
		dev, err := d.device(device)
		if err != nil {
			return nil, err
		}
		return dev.Changes(), nil
	}
	s, err := d.snapshot(snapshot)
	if err != nil {
		return nil, err
	}
	i, ok := s.Image(device)
	if !ok {
		return nil, refuse(syscall.ENOENT, "snapshot %s has no device %q", snapshot, clip(device))
	}
	return i.Changes(), nil
}

// parseNumber reads a snapshot's number in the one form that it is written in.
func parseNumber(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && decimal(n) == s
}

func asExtents(runs iter.Seq2[cow.Run, error]) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for r, err := range runs {
			kind := "data"
			if r.Zero {
				kind = "zero"
			}
			if !yield(Extent{r.Off, r.N, kind}, err) {
				return
			}
		}
	}
}

// mark makes ranges of a device count as changed: all of them, or none if one
// is not inside the device.
func (d *Daemon) mark(device string, ranges []Range) error {
	dev, err := d.device(device)
	if err != nil {
		return err
	}
	for _, r := range ranges {
		if err := r.check(dev.Size()); err != nil {
			return err
		}
	}
	for _, r := range ranges {
		if err := dev.Mark(r.Offset, r.Length); err != nil {
			return fmt.Errorf("mark %s: %w", device, err)
		}
	}
	d.record("marked", device, "", plural(len(ranges), "range")+" marked as changed by hand")
	return nil
}

// reset begins a new generation of a device's change tracking.
func (d *Daemon) reset(device string) error {
	dev, err := d.device(device)
	if err != nil {
		return err
	}
	if err := dev.Reset("an operator asked for it"); err != nil {
		return fmt.Errorf("reset changes of %s: %w", device, err)
	}
	return nil
}

// decimal is parseNumber's inverse.
func decimal(n uint64) string { return strconv.FormatUint(n, 10) }
