// What the commands print: aligned columns for people, or with JSON one object
// a line for scripts.

package control

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Output is where a command prints, and how.
type Output struct {
	io.Writer
	JSON bool
}

// printAll prints rows under a header, or each value as a line of JSON.
func printAll[T any](o Output, header string, values []T, row func(T) []string) error {
	if o.JSON {
		enc := json.NewEncoder(o)
		for _, v := range values {
			if err := enc.Encode(v); err != nil {
				return err
			}
		}
		return nil
	}
	if len(values) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(o, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(header, " ", "\t"))
	for _, v := range values {
		fmt.Fprintln(w, strings.Join(row(v), "\t"))
	}
	return w.Flush()
}

// printOne prints one value as lines of a key and a value.
func printOne(o Output, v any, pairs ...string) error {
	if o.JSON {
		return json.NewEncoder(o).Encode(v)
	}
	w := tabwriter.NewWriter(o, 0, 8, 2, ' ', 0)
	for i := 0; i < len(pairs); i += 2 {
		fmt.Fprintf(w, "%s\t%s\n", pairs[i], pairs[i+1])
	}
	return w.Flush()
}

// Devices prints a line for each device.
func (o Output) Devices(l []DeviceInfo) error {
	return printAll(o, "NAME SIZE STATE SNAPSHOTS CLIENTS ORIGIN", l, func(v DeviceInfo) []string {
		return []string{v.Name, people(v.Size), v.State, strconv.Itoa(len(v.Snapshots)), strconv.Itoa(v.Clients), v.Origin}
	})
}

// Device prints all about one device.
func (o Output) Device(v DeviceInfo) error {
	return printOne(o, v, append([]string{
		"name", v.Name,
		"origin", v.Origin,
		"size", sizeLine(v.Size),
		"uri", v.URI,
		"state", v.State,
		"clients", strconv.Itoa(v.Clients),
		"snapshots", orDash(strings.Join(v.Snapshots, ", ")),
		"store_wait", v.StoreWait.String(),
	}, changesPairs("cbt/", v.CBT)...)...)
}

// Added prints a device that was added as serve prints those that it begins
// with.
func (o Output) Added(v DeviceInfo) error {
	_, err := fmt.Fprintf(o, "%s  %d  %s\n", v.Name, v.Size, v.URI)
	return err
}

// Taken prints the name of a snapshot that was taken, alone, for scripts.
func (o Output) Taken(v SnapshotInfo) error {
	_, err := fmt.Fprintln(o, v.Name)
	return err
}

// RolledBack prints which devices were rolled back to a snapshot.
func (o Output) RolledBack(v RollbackInfo, snapshot string) error {
	_, err := fmt.Fprintf(o, "%s rolled back to %s\n", strings.Join(v.Devices, ", "), snapshot)
	return err
}

// Version prints what the daemon is.
func (o Output) Version(v VersionInfo) error {
	_, err := fmt.Fprintf(o, "daemon  blksnap %s  process %d\n", v.Version, v.PID)
	return err
}

// Changes prints all about a device's change tracking.
func (o Output) Changes(v ChangesInfo) error { return printOne(o, v, changesPairs("", v)...) }

func changesPairs(prefix string, v ChangesInfo) []string {
	pairs := []string{
		prefix + "block_size", strconv.FormatInt(v.BlockSize, 10),
		prefix + "generation", v.Generation,
		prefix + "number", decimal(v.Number),
		prefix + "base", decimal(v.Base),
	}
	if v.Reason != "" {
		pairs = append(pairs, prefix+"reason", v.Reason)
	}
	if v.Warning != "" {
		pairs = append(pairs, prefix+"warning", v.Warning)
	}
	return pairs
}

// Snapshots prints a line for each snapshot.
func (o Output) Snapshots(l []SnapshotInfo) error {
	return printAll(o, "NAME CREATED STATE ACCESS HOLDS DEVICES", l, func(v SnapshotInfo) []string {
		var devices []string
		for _, i := range v.Images {
			devices = append(devices, i.Device)
		}
		return []string{v.Name, clock(v.Created), v.State, v.access(), people(v.holds()), strings.Join(devices, ",")}
	})
}

// access is what may be done to v's images.
func (v SnapshotInfo) access() string {
	if v.Writable {
		return "rw"
	}
	return "ro"
}

// holds is how many bytes of the snapstore would be free without v, at least.
func (v SnapshotInfo) holds() (n int64) {
	for _, i := range v.Images {
		n += i.Holds
	}
	return n
}

// shares is how many more it reads.
func (v SnapshotInfo) shares() (n int64) {
	for _, i := range v.Images {
		n += i.shares()
	}
	return n
}

func (i ImageInfo) shares() int64 {
	if i.Shares == nil {
		return 0
	}
	return *i.Shares
}

// Snapshot prints all about one snapshot, and a line for each image.
func (o Output) Snapshot(v SnapshotInfo) error {
	pairs := []string{
		"name", v.Name,
		"created", v.Created.Format(time.RFC3339Nano),
		"state", v.State,
		"access", v.access(),
		"held_up", v.HeldUp.String(),
		"holds", sizeLine(v.holds()),
		"shares", sizeLine(v.shares()),
		"max_store", v.maxStore(),
		"expires", v.expires(),
	}
	if v.Store != nil {
		pairs = append(pairs, "store", v.Store.text())
	}
	if err := printOne(o, v, pairs...); err != nil || o.JSON {
		return err
	}
	fmt.Fprintln(o)
	return printAll(o, "DEVICE SIZE STATE HOLDS SHARES NUMBER URI", v.Images, func(i ImageInfo) []string {
		return []string{i.Device, people(i.Size), i.State, people(i.Holds), people(i.shares()), decimal(i.CBT.Number), i.URI}
	})
}

// text says how much room there is and how long it lasts.
func (v SpaceInfo) text() string {
	text := fmt.Sprintf("%s of %s free", people(v.Free), people(v.Size))
	if v.Left > 0 {
		text += fmt.Sprintf(", full in %s at the present rate, %s", span(v.Left), rate(v.Rate))
	}
	return text
}

func (v SnapshotInfo) maxStore() string {
	if v.MaxStore == 0 {
		return "all of it"
	}
	return sizeLine(v.MaxStore)
}

func (v SnapshotInfo) expires() string {
	if v.Expires == nil {
		return "never"
	}
	return v.Expires.Format(time.RFC3339)
}

// Store prints a line for each part of the snapstore.
func (o Output) Store(l []PartInfo) error {
	return printAll(o, "PART SIZE USED FREE STATE", l, func(v PartInfo) []string {
		return []string{v.Part, people(v.Size), people(v.Used), people(v.Free), v.State}
	})
}

// Inspected prints a line for each problem, and is an error where there is one.
func (o Output) Inspected(l []StateProblem) error {
	all := func(yield func(StateProblem, error) bool) {
		for _, v := range l {
			if !yield(v, nil) {
				return
			}
		}
	}
	err := printStream(o, all, false, func(v StateProblem) string {
		return fmt.Sprintf("%s: %s; %s", v.File, v.Problem, v.Advice)
	})
	if err == nil && len(l) > 0 {
		err = fmt.Errorf("the state has %s", plural(len(l), "problem"))
	}
	return err
}

// Extents prints extents in the form of the tree's since/NUM.
func (o Output) Extents(extents iter.Seq2[Extent, error]) error {
	return printStream(o, extents, false, func(v Extent) string {
		return fmt.Sprintf("%d %d %s", v.Offset, v.Length, v.Kind)
	})
}

// Events prints events as they come.
func (o Output) Events(events iter.Seq2[Event, error]) error {
	return printStream(o, events, true, func(v Event) string {
		words := []string{clock(v.Time), v.Kind}
		for _, s := range []string{v.Device, v.Snapshot, v.Text} {
			if s != "" {
				words = append(words, s)
			}
		}
		return strings.Join(words, "  ")
	})
}

// printStream prints a line for each value, with flush as it comes, and returns
// the error that ends them.
func printStream[T any](o Output, values iter.Seq2[T, error], flush bool, text func(T) string) error {
	w := bufio.NewWriter(o)
	enc := json.NewEncoder(w)
	for v, err := range values {
		switch {
		case err != nil:
			return errors.Join(w.Flush(), err)
		case o.JSON:
			err = enc.Encode(v)
		default:
			_, err = fmt.Fprintln(w, text(v))
		}
		if err == nil && flush {
			err = w.Flush()
		}
		if err != nil {
			return err
		}
	}
	return w.Flush()
}
